"""Settings of training runs that together use every part of a step, for tests of devices."""

NO_GEOMETRY = {"rotation_degrees": 0, "translation": 0, "scale": 0}

PARTS = {
    "rotation, pieces, clipping, class weights": {
        "loop": {"accumulate": 2, "balance": "weights", "label_smoothing": 0.1},
        "optimiser": {"clip_norm": 1.0},
    },
    "crops, colour, erasing, mixing, whitening": {
        "model": {"name": "resnet8", "options": {"width": 0.25}},
        "input": {"size": 16, "channels": 3},
        "augment": {
            **NO_GEOMETRY,
            "crop_padding": 2,
            "horizontal_flip": True,
            "fill": "zeros",
            "erasing": 0.5,
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.2,
            "mixup": 0.4,
            "cutmix": 0.4,
        },
        "optimiser": {"name": "sgd"},
    },
    "TrivialAugment, auxiliary heads": {
        "model": {"name": "googlenet", "options": {"width": 0.25}},
        "augment": {"trivial_augment": True, "crop_area": 0.5, "fill": "reflection"},
    },
}
