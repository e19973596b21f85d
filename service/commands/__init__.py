"""The serving commands of `convoy`, one module each. They import what they need when they run."""
