import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from service.errors import ConfigurationError, TrainingError
from training import checkpoint
from training.assemble import build_stepper, build_trainer
from training.config import Experiment, find_experiment, load_experiment
from training.distributed import Group
from training.loop import BEST, StoppedError
from training.models import LoadReport, create, describe
from training.transfer import inherited_statistics, plan, provenance, stage_table, start_from

ENTRY = describe("resnet18")


def experiment_of(weights="w.pth", epochs=8, model="resnet18", options=None, **transfer):
    return Experiment.model_validate({
        "model": {"name": model, "options": options or {}},
        "loop": {"epochs": epochs, "precision": "float32"},
        "transfer": {"weights": weights, **transfer},
    })  # fmt: skip


def test_from_scratch_is_one_phase_in_which_all_learns():
    (phase,) = plan(experiment_of(weights=None), ENTRY)
    assert phase.epochs == 8
    assert phase.multiple("conv1.weight") == 1


@pytest.mark.parametrize(
    ("strategy", "lengths"),
    [("linear-probe", [8]), ("fine-tune", [8]), ("lp-ft", [2, 6]), ("gradual", None)],
)
def test_phases_use_all_epochs(strategy, lengths):
    phases = plan(experiment_of(strategy=strategy), ENTRY)
    assert sum(phase.epochs for phase in phases) == 8
    assert all(phase.epochs for phase in phases)
    if lengths:
        assert [phase.epochs for phase in phases] == lengths


def test_lp_ft_trains_the_head_first_then_everything_slower():
    probe, tune = plan(experiment_of(spread=100), ENTRY)
    assert probe.multiple("fc.weight") == 1
    assert probe.multiple("layer4.1.conv2.weight") == 0
    assert tune.multiple("fc.weight") == 1
    first, last = tune.multiple("conv1.weight"), tune.multiple("layer4.0.conv1.weight")
    assert first == pytest.approx(0.01)
    assert first < last < 1


def test_gradual_unfreezes_from_the_head_down():
    phases = plan(experiment_of(strategy="gradual"), ENTRY)
    free = [sum(phase.multiple(stage[0]) > 0 for stage in ENTRY.stages) for phase in phases]
    assert free == sorted(free)
    assert free[-1] == len(ENTRY.stages)
    assert phases[0].multiple("fc.bias") == 1


def test_one_epoch_is_too_few_for_two_phases():
    with pytest.raises(ConfigurationError, match="at least 2 epochs"):
        plan(experiment_of(epochs=1), ENTRY)
    assert len(plan(experiment_of(epochs=1, strategy="fine-tune"), ENTRY)) == 1


@pytest.fixture(scope="module")
def imagenet_file(tmp_path_factory):
    """A checkpoint as torchvision publishes them: 1000 classes, three channels."""
    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(create("resnet18", 1000, 3, width=0.125).state_dict(), file)
    return file


def test_all_but_the_head_is_loaded_and_gray_input_adapted(imagenet_file):
    torch.manual_seed(0)
    model = create("resnet18", 4, 1, width=0.125)
    head = model.fc.weight.detach().clone()
    config = experiment_of(weights=imagenet_file, licence="CC-BY-4.0").transfer
    report = start_from(model, ENTRY, config)
    source = torch.load(imagenet_file, weights_only=True)
    assert torch.equal(model.layer3[0].conv1.weight, source["layer3.0.conv1.weight"])
    torch.testing.assert_close(model.conv1.weight, source["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(model.fc.weight, head)
    told = provenance(config, report)
    assert "lp-ft from resnet18.pth" in told.source
    assert told.licence == "CC-BY-4.0"


@pytest.mark.parametrize(
    ("name", "verified", "licence"),
    [
        ("resnet18-f37072fd.pth", True, "BSD-3-Clause (torchvision)"),
        ("resnet18-f37072fd.pth", False, "unspecified"),
        ("ours-f37072fd.pth", True, "unspecified"),
    ],
)
def test_only_published_weights_have_their_publisher_s_licence(name, verified, licence):
    report = LoadReport(Path(name), "0" * 64, verified, (), (), (), ())
    for experiment in (experiment_of(weights=Path(name)), load_experiment(find_experiment("photos-transfer"), {})):
        assert provenance(experiment.transfer, report).licence == licence


def test_pixels_are_normalised_as_the_weights_expect(imagenet_file, tmp_path):
    imagenet = inherited_statistics(experiment_of(weights=imagenet_file).transfer, ENTRY, 3)
    assert imagenet == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.save({"model": {}, "mean": (0.1,), "std": (0.3,)}, tmp_path / "best.pt")
    assert inherited_statistics(experiment_of(weights=tmp_path / "best.pt").transfer, ENTRY, 1) == ((0.1,), (0.3,))
    assert inherited_statistics(experiment_of(weights=tmp_path / "best.pt").transfer, ENTRY, 3) == (
        (0.1,) * 3,
        (0.3,) * 3,
    )
    colour = {"model": {}, "mean": (0.5, 0.25, 0.75), "std": (0.25, 0.5, 0.75)}
    torch.save(colour, tmp_path / "colour.pt")
    assert inherited_statistics(experiment_of(weights=tmp_path / "colour.pt").transfer, ENTRY, 1) == ((0.5,), (0.5,))
    assert inherited_statistics(experiment_of(weights=None).transfer, ENTRY, 3) is None


@pytest.mark.parametrize(
    ("mean", "std", "taken"),
    [
        (torch.tensor([0.5, 0.25, 0.5]), [0.5, 0.25, 1], True),
        ([0.5, 0.25, 0.5], None, False),
        ([0.5, 0.25, 0.5], [0.5, 0.0, 1.0], False),
        ([0.5, 0.25, 0.5], [0.5, float("inf"), 1.0], False),
        ("rgb", "rgb", False),
        (0.5, 0.5, False),
        (torch.tensor(0.5), torch.tensor(0.5), False),
        (torch.ones(3, 2), torch.ones(3, 2), False),
    ],
)
def test_statistics_of_any_file_are_checked(tmp_path, mean, std, taken):
    torch.save({"model": {}, "mean": mean} | ({} if std is None else {"std": std}), tmp_path / "own.pth")
    found = inherited_statistics(experiment_of(weights=tmp_path / "own.pth").transfer, ENTRY, 3)
    own = ((0.5, 0.25, 0.5), (0.5, 0.25, 1.0))
    assert found == (own if taken else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert all(type(value) is float for values in found for value in values)


def test_weights_of_another_architecture_are_refused(imagenet_file):
    model = create("lenet5", 4, 1)
    with pytest.raises(TrainingError, match="resnet18"):
        start_from(model, describe("lenet5"), experiment_of(weights=imagenet_file).transfer)


def test_the_table_says_what_was_loaded_replaced_and_frozen(imagenet_file):
    model = create("resnet18", 4, 1, width=0.125)
    experiment = experiment_of(weights=imagenet_file)
    report = start_from(model, ENTRY, experiment.transfer)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(stage_table(model, ENTRY, report, plan(experiment, ENTRY)))
    text = console.export_text()
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "1 adapted" in rows["conv1, bn1"]
    assert "frozen" in rows["layer1"]
    assert "2 new" in rows["fc"]
    assert "linear probe (2 epochs)" in text


class Quiet:
    def step(self, images, loss):
        pass

    def epoch(self, history):
        pass


def test_the_probe_leaves_the_body_alone_with_its_norms(digit_data, tmp_path):
    """A convnet with BatchNorm, first trained on its own, then probed: only the head may move."""
    torch.manual_seed(3)
    source = create("resnet18", 7, 1, width=0.125, small_images=True)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    options = {"width": 0.125, "small_images": True}
    experiment = experiment_of(tmp_path / "w.pth", epochs=2, options=options, strategy="linear-probe")
    stepper, report = build_stepper(experiment, ENTRY, digit_data, Group())
    trainer = build_trainer(experiment, digit_data, stepper, plan(experiment, ENTRY), tmp_path, Group())
    trainer.fit(Quiet())
    assert report is not None
    trained = checkpoint.load(tmp_path / BEST)["model"]
    moved = {name for name, tensor in source.state_dict().items() if not torch.equal(tensor, trained[name])
             if not name.startswith("fc.")}  # fmt: skip
    assert moved == set()


def test_phases_resume_where_they_stopped(digit_data, tmp_path):
    torch.save(create("lenet5", 3, 1).state_dict(), tmp_path / "w.pth")
    experiment = experiment_of(tmp_path / "w.pth", epochs=4, model="lenet5")
    entry = describe("lenet5")

    def trainer_in(name):
        (tmp_path / name).mkdir(exist_ok=True)
        stepper, _ = build_stepper(experiment, entry, digit_data, Group())
        return build_trainer(experiment, digit_data, stepper, plan(experiment, entry), tmp_path / name, Group())

    whole = trainer_in("whole")
    whole.fit(Quiet())
    for stop in (2, 4, 6):  # within the probe, between the phases, within fine-tuning
        folder = f"parts{stop}"
        first = trainer_in(folder)
        with pytest.raises(StoppedError):
            first.fit(Quiet(), lambda first=first, stop=stop: first.progress.step == stop)
        second = trainer_in(folder)
        second.resume()
        second.fit(Quiet())
        expected = checkpoint.load(tmp_path / "whole" / "last.pt")["stepper"]["model"]
        found = checkpoint.load(tmp_path / folder / "last.pt")["stepper"]["model"]
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_stem_that_follows_the_data_does_so_from_scratch_only(digit_data, tmp_path):
    entry = describe("resnet8")
    scratch = experiment_of(None, epochs=2, model="resnet8", options={"width": 0.25})
    stepper, _ = build_stepper(scratch, entry, digit_data, Group())
    filters = stepper.model.stem.weight.detach()
    torch.testing.assert_close(filters[:4], -filters[4:])  # a principal direction and its negative
    assert torch.equal(stepper.average.model.stem.weight, filters)

    torch.save(create("resnet8", 7, 1, width=0.25).state_dict(), tmp_path / "w.pth")
    loaded, _ = build_stepper(experiment_of(tmp_path / "w.pth", epochs=2, model="resnet8", options={"width": 0.25}),
                              entry, digit_data, Group())  # fmt: skip
    stored = torch.load(tmp_path / "w.pth", weights_only=True)["stem.weight"]
    assert torch.equal(loaded.model.stem.weight, stored)


@pytest.mark.parametrize("strategy", ["fine-tune", "lp-ft", "gradual"])
def test_stages_are_slower_by_one_factor_each_down_to_the_spread(strategy):
    phase = plan(experiment_of("w.pth", strategy=strategy, spread=32.0), ENTRY)[-1]
    rates = [phase.multiple(f"{stage}.weight") for stage in ("conv1", "layer1", "layer2", "layer3", "layer4")]
    assert rates == pytest.approx([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2])
    assert phase.multiple("fc.weight") == 1


@pytest.mark.parametrize(("strategy", "peaks"), [("linear-probe", [1]), ("fine-tune", [1]), ("lp-ft", [1, 0.5])])
def test_whole_networks_that_have_been_probed_learn_at_half_of_the_peak(strategy, peaks):
    assert [phase.peak for phase in plan(experiment_of("w.pth", strategy=strategy), ENTRY)] == peaks
    gradual = plan(experiment_of("w.pth", strategy="gradual"), ENTRY)
    assert [phase.peak for phase in gradual] == [1] + [0.5] * (len(gradual) - 1)


def test_a_probe_leaves_an_epoch_for_the_rest():
    lengths = [phase.epochs for phase in plan(experiment_of("w.pth", epochs=2, probe=0.99), ENTRY)]
    assert lengths == [1, 1]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("strategy", ["linear-probe", "fine-tune", "lp-ft", "gradual"])
def test_norms_are_frozen_in_all_phases_or_in_none(strategy, freeze):
    phases = plan(experiment_of("w.pth", strategy=strategy, freeze_norm=freeze), ENTRY)
    assert {phase.freeze_norm for phase in phases} == {freeze}


def test_auxiliary_heads_of_other_classes_start_anew(tmp_path):
    torch.save(create("googlenet", 7, 3, width=0.125, aux=True).state_dict(), tmp_path / "w.pth")
    model = create("googlenet", 4, 3, width=0.125, aux=True)
    report = start_from(model, describe("googlenet"), experiment_of(tmp_path / "w.pth").transfer)
    assert {name.split(".")[0] for name in report.replaced} == {"aux1", "aux2", "fc"}


def test_phases_of_gradual_use_all_epochs_whatever_their_number():
    for epochs in range(2, 20):
        phases = plan(experiment_of("w.pth", strategy="gradual", epochs=epochs), ENTRY)
        assert sum(phase.epochs for phase in phases) == epochs
        assert all(phase.epochs for phase in phases)
