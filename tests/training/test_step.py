import numpy as np
import pytest
import torch
from torch import nn

from training.batches import Batch
from training.config import AugmentConfig, Experiment, ScheduleConfig
from training.distributed import Group
from training.draws import Column, draws
from training.mix import Mixer
from training.models import create
from training.optimise import Average
from training.phases import Phase
from training.pixels import Normaliser, unit_range
from training.schedule import rate
from training.step import Stepper, class_weights

NORMALISE = Normaliser((0.5,), (0.5,))
STILL = {"rotation_degrees": 0, "translation": 0, "scale": 0}


def batch_of(count=8, channels=1, size=32, seed=0):
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.integers(0, 256, (count, size, size, channels), dtype=np.uint8))
    return Batch(images, torch.from_numpy(random.integers(0, 10, count)), draws(count, seed, 0), count)


def stepper_of(model=None, weights=None, normalise=NORMALISE, precision="float32", group=None, **tree):
    torch.manual_seed(0)
    experiment = Experiment.model_validate({"augment": STILL, "schedule": {"name": "constant", "warmup": 0}, **tree})
    stepper = Stepper(
        model or create("lenet5", 10, 1),
        experiment,
        normalise,
        class_weights=weights,
        device=torch.device("cpu"),
        group=group or Group(),
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


def test_choosing_a_precision_takes_no_more_images_at_once_than_training():
    stepper = stepper_of(fresh("lenet5", 10, 1), loop={"accumulate": 4})
    sizes = []
    run = stepper.trial(batch_of(16))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        run("float32")
    finally:
        hook.remove()
    assert max(sizes) == 4


CPU = torch.device("cpu")


@pytest.mark.parametrize("augment", [{"mixup": 0.5}, {"cutmix": 0.5}])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_pair_is_shared_as_its_pixels_are(augment, smoothing):
    stepper = stepper_of(fresh("lenet5", 10, 1), augment={**STILL, **augment}, loop={"label_smoothing": smoothing})
    for step in (3, 4):
        batch = batch_of(seed=step)
        mixed = Mixer(AugmentConfig(**STILL, **augment), 0)(NORMALISE(unit_range(batch.images)), batch.labels, step)
        assert abs(mixed.share - 0.5) > 0.05
        with torch.no_grad():
            logits = stepper.model(mixed.inputs)
        own, other = (
            nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
            for labels in (mixed.labels, mixed.partners)
        )
        torch.testing.assert_close(stepper(batch, step), mixed.share * own + (1 - mixed.share) * other)


def test_clipping_in_half_precision_is_of_the_gradient_and_not_of_the_scaled_one():
    """The norm that is clipped to does not depend on the scale of the loss."""
    options = {"optimiser": {"name": "sgd", "momentum": 0, "weight_decay": 0, "clip_norm": 0.01}}
    before, after = weights_after(0, precision="float16", **options), weights_after(1, precision="float16", **options)
    assert (after - before).norm() == pytest.approx(0.01 * 0.01, rel=1e-2)


def test_the_average_is_that_of_all_steps_also_in_a_later_phase():
    stepper = stepper_of(loop={"ema_decay": 0.9}, optimiser={"name": "sgd"})
    expected = Average(stepper.model, 0.9)
    for step in range(30):
        if step == 20:
            stepper.begin(Phase("second", 1), 0.01, 20, 10)
        stepper(batch_of(seed=step), step)
        expected.update(step)
    torch.testing.assert_close(flat(stepper.average.model), flat(expected.model), atol=0, rtol=0)
    assert not torch.equal(flat(stepper.average.model), flat(stepper.model))


def test_each_stage_moves_at_its_multiple_of_the_scheduled_rate():
    model = fresh("lenet5", 10, 1)
    stepper = stepper_of(
        model, optimiser={"name": "sgd", "momentum": 0, "weight_decay": 0}, schedule={"name": "cosine", "warmup": 0}
    )
    names = [name for name, _ in model.named_children() if any(True for _ in getattr(model, name).parameters())]
    stepper.begin(Phase("two", 1, stages=(((names[0],), 0.25),)), 0.02, 100, 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepper(batch_of(), 105)
    expected = 0.02 * rate(ScheduleConfig(name="cosine", warmup=0), 5, 10)
    assert stepper.learning_rate == pytest.approx(expected)
    for name, parameter in model.named_parameters():
        step = expected * (0.25 if name.startswith(names[0] + ".") else 1)
        torch.testing.assert_close(parameter.detach(), before[name] - step * parameter.grad, atol=1e-7, rtol=1e-5)


def test_training_images_are_augmented():
    stepper = stepper_of(fresh("lenet5", 10, 1), augment={**STILL, "horizontal_flip": True})
    batch = batch_of()
    flipped = batch.uniform[:, Column.FLIP_X] < 0.5
    assert 0 < flipped.sum() < len(flipped)
    images = torch.where(flipped[:, None, None, None], batch.images.flip(2), batch.images)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(stepper.model(NORMALISE(unit_range(images))), batch.labels)
    torch.testing.assert_close(stepper(batch, 0), expected)


def test_processes_drop_other_features():
    def loss(rank):
        return stepper_of(fresh("lenet5", 10, 1, dropout=0.5), group=Group(rank, 1))(batch_of(), 0).item()

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
