import numpy as np
import pytest
import torch
from torch import nn

from training.batches import Batch
from training.config import Experiment
from training.distributed import Group
from training.draws import draws
from training.models import create
from training.phases import Phase
from training.pixels import Normaliser, unit_range
from training.step import Stepper, class_weights

NORMALISE = Normaliser((0.5,), (0.5,))
STILL = {"rotation_degrees": 0, "translation": 0, "scale": 0}


def batch_of(count=8, channels=1, size=32, seed=0):
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.integers(0, 256, (count, size, size, channels), dtype=np.uint8))
    return Batch(images, torch.from_numpy(random.integers(0, 10, count)), draws(count, seed, 0), count)


def stepper_of(model=None, weights=None, normalise=NORMALISE, precision="float32", **tree):
    torch.manual_seed(0)
    experiment = Experiment.model_validate({"augment": STILL, "schedule": {"name": "constant", "warmup": 0}, **tree})
    stepper = Stepper(
        model or create("lenet5", 10, 1),
        experiment,
        normalise,
        class_weights=weights,
        device=torch.device("cpu"),
        group=Group(),
    )
    stepper.precision = precision
    stepper.begin(Phase("all", 1), 0.01, 0, 100)
    stepper.train()
    return stepper


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def fresh(name, *args, **options):
    torch.manual_seed(0)
    return create(name, *args, **options)


def weights_after(steps=3, **options):
    stepper = stepper_of(**options)
    for step in range(steps):
        stepper(batch_of(seed=step), step)
    return flat(stepper.model)


def test_a_step_is_that_of_plain_pytorch():
    torch.manual_seed(0)
    model = create("lenet5", 10, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    for step in range(3):
        batch = batch_of(seed=step)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(NORMALISE(unit_range(batch.images))), batch.labels).backward()
        optimiser.step()
    plain = flat(model)
    ours = weights_after(optimiser={"name": "sgd", "weight_decay": 0})
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_pieces_of_a_batch_add_up_to_it():
    sgd = {"name": "sgd"}
    torch.testing.assert_close(
        weights_after(optimiser=sgd, loop={"accumulate": 3}), weights_after(optimiser=sgd), atol=1e-6, rtol=1e-5
    )


def test_more_pieces_than_images_are_no_problem():
    stepper = stepper_of(loop={"accumulate": 50})
    assert stepper(batch_of(4), 0).isfinite()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_ends_near_float32(precision):
    low, full = weights_after(precision=precision), weights_after()
    assert not torch.equal(low, full)
    # Adam moves every weight by about the rate, whichever way a tiny gradient points: compare most of them.
    assert (low - full).abs().median() < 0.002


def test_clipping_bounds_the_update():
    options = {"optimiser": {"name": "sgd", "momentum": 0, "weight_decay": 0, "clip_norm": 0.01}}
    before = weights_after(steps=0, **options)
    after = weights_after(steps=1, **options)
    assert (after - before).norm() == pytest.approx(0.01 * 0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_no_piece_has_a_single_image(name):
    """BatchNorm cannot learn from one."""
    size = {"resnet18": 32, "googlenet": 64}[name]
    stepper = stepper_of(
        create(name, 10, 3, width=0.125), normalise=Normaliser((0.5,) * 3, (0.5,) * 3), loop={"accumulate": 2}
    )
    assert stepper(batch_of(3, 3, size), 0).isfinite()
    assert all(tensor.isfinite().all() for tensor in stepper.model.state_dict().values())


@pytest.mark.parametrize("same_phase", [True, False])
def test_the_scale_of_losses_is_that_of_its_optimiser(same_phase):
    first, second = stepper_of(precision="float16"), stepper_of(precision="float16")
    begun = second.state()["scaler"]["scale"]
    state = first.state()
    state["scaler"]["scale"] = begun / 8
    second.load(state, with_optimiser=same_phase)
    assert second.state()["scaler"]["scale"] == (begun / 8 if same_phase else begun)


def test_classes_without_images_change_no_weights():
    labels = np.array([0] * 6 + [2] * 3)
    weights = class_weights(labels, 4)
    assert weights[labels].mean() == pytest.approx(1)
    assert weights[[1, 3]].tolist() == [1, 1]


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_class_weights_average_to_one_and_count_in_the_loss(smoothing):
    labels = np.array([0] * 6 + [1] * 3)
    weights = class_weights(labels, 2)
    assert weights[labels].mean() == pytest.approx(1)
    assert weights[1] == pytest.approx(2 * weights[0])
    batch = batch_of(2)._replace(labels=torch.tensor([0, 1]))
    stepper = stepper_of(fresh("lenet5", 2, 1), weights=weights, loop={"label_smoothing": smoothing})
    with torch.no_grad():
        logits = stepper.model(NORMALISE(unit_range(batch.images)))
    losses = nn.functional.cross_entropy(logits, batch.labels, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(stepper(batch, 0), (losses * torch.from_numpy(weights)).mean())


def test_auxiliary_heads_count_with_their_weight():
    model = fresh("googlenet", 10, 3, aux=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    stepper = stepper_of(model, normalise=Normaliser((0.5,) * 3, (0.5,) * 3))
    batch = batch_of(4, 3, 64)
    with torch.no_grad():
        outputs = model(stepper_inputs(batch))
    parts = [nn.functional.cross_entropy(logits, batch.labels) for logits in (outputs.logits, *outputs.aux_logits)]
    assert len(parts) == 3
    torch.testing.assert_close(stepper(batch, 0), parts[0] + 0.3 * (parts[1] + parts[2]), atol=1e-4, rtol=1e-4)
    assert stepper.heads == pytest.approx(1.6)


def stepper_inputs(batch):
    return Normaliser((0.5,) * 3, (0.5,) * 3)(unit_range(batch.images))


def test_dropout_depends_on_the_step_and_not_on_the_past():
    def losses(noise):
        torch.manual_seed(0)
        stepper = stepper_of(create("lenet5", 10, 1, dropout=0.5))
        found = []
        for step in range(4):
            torch.rand(noise)
            found.append(stepper(batch_of(), step).item())
        return found

    assert losses(1) == losses(5)


def test_trying_a_precision_changes_nothing():
    stepper = stepper_of()
    before = {name: tensor.clone() for name, tensor in stepper.model.state_dict().items()}
    stepper.trial(batch_of())("bfloat16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in stepper.model.state_dict().items())
    assert all(p.grad is None for p in stepper.model.parameters())


def test_compiled_steps_learn_the_same():
    compiled, plain = weights_after(steps=2, loop={"compile": True}), weights_after(steps=2)
    assert (compiled - plain).abs().median() < 1e-5
