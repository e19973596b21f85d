"""`python -m service` is `convoy`."""

from service.cli import main

main()
