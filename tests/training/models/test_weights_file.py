import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from service.errors import TrainingError
from training.models import read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def write(path, content=STATE, **options):
    torch.save(content, path, **options)
    return path


def hashed(path):
    """Renames a file as torchvision would."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f"{path.stem}-{digest}{path.suffix}"))


def assert_is_state(file):
    assert set(file.state) == set(STATE)
    assert all(torch.equal(file.state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoints_of_both_formats_are_read(tmp_path, zipped):
    path = write(tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    file = read_weights(path)
    assert_is_state(file)
    assert (file.path, file.verified) == (path, False)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_are_read(tmp_path):
    save_file(STATE, tmp_path / "net.safetensors")
    assert_is_state(read_weights(tmp_path / "net.safetensors"))


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_weights_are_found_among_other_things(tmp_path, key):
    assert_is_state(read_weights(write(tmp_path / "last.pt", {"epoch": 3, key: STATE, "optimizer": {"lr": 0.1}})))


def test_parameters_are_read_like_tensors(tmp_path):
    parameters = {name: nn.Parameter(tensor) for name, tensor in STATE.items()}
    assert_is_state(read_weights(write(tmp_path / "net.pth", parameters)))


@pytest.mark.parametrize("name", [0, b"a.weight"])
def test_names_that_are_no_text_are_refused(tmp_path, name):
    with pytest.raises(TrainingError, match="holds no weights: names with tensors"):
        read_weights(write(tmp_path / "net.pth", {name: torch.ones(2)}))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's: such files are from before
@pytest.mark.parametrize(
    "changed",
    [torch.Tensor.to_sparse, lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)],
    ids=["sparse", "quantised"],
)
def test_tensors_that_are_not_dense_are_refused(tmp_path, changed):
    with pytest.raises(TrainingError, match=r"sparse or quantised tensors \(fc\.weight is the first of 1\)"):
        read_weights(write(tmp_path / "net.pth", STATE | {"fc.weight": changed(torch.eye(2))}))


def test_flipped_bits_are_found_without_a_hash_in_the_name(tmp_path):
    """PyTorch's reader takes such weights as they are."""
    path = write(tmp_path / "net.pth")
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(STATE["a.weight"].numpy().tobytes()) + 5] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(TrainingError, match=r"net\.pth is no readable checkpoint: .* is damaged"):
        read_weights(path)


def test_the_hash_in_the_name_is_verified(tmp_path):
    path = hashed(write(tmp_path / "net.pth"))
    assert read_weights(path).verified
    assert not read_weights(path, check_hash=False).verified
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(TrainingError, match=f"{path.name} is damaged or was changed: its SHA-256 begins with"):
        read_weights(path)


def test_the_hash_of_safetensors_is_verified_too(tmp_path):
    save_file(STATE, tmp_path / "net.safetensors")
    assert read_weights(hashed(tmp_path / "net.safetensors")).verified
    save_file(STATE, tmp_path / "net-0123abcd.safetensors")
    with pytest.raises(TrainingError, match="its name says 0123abcd"):
        read_weights(tmp_path / "net-0123abcd.safetensors")


def test_an_unverified_file_can_be_read_on_demand(tmp_path):
    path = write(tmp_path / "net-0123abcd.pth")
    with pytest.raises(TrainingError, match="its name says 0123abcd"):
        read_weights(path)
    assert_is_state(read_weights(path, check_hash=False))


@pytest.mark.parametrize("name", ["mine-20240131.pth", "net-0123ABCD.pth", "net-0123abc.pth", "net-0123abcd (1).pth"])
def test_a_date_or_another_name_is_no_hash(tmp_path, name):
    assert not read_weights(write(tmp_path / name)).verified


def test_a_published_name_of_digits_only_is_a_hash(tmp_path):
    with pytest.raises(TrainingError, match="its name says 19584684"):
        read_weights(write(tmp_path / "vgg13-19584684.pth"))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", b"<!DOCTYPE html><html></html>", b"PK\x03\x04 half a zip file", b"\x80\x02}q\x00"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_files_are_refused_in_one_line(tmp_path, content, suffix):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=f"net{suffix} is no ") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    for zipped in (True, False):
        path = write(tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(TrainingError, match="is no "):
            read_weights(path)


@pytest.mark.parametrize("place", ["missing.pth", "."])
def test_a_path_that_cannot_be_read_is_named(tmp_path, place):
    with pytest.raises(TrainingError, match=r"cannot be read: (No such file|Is a directory)"):
        read_weights(tmp_path / place)


def test_of_a_published_file_that_is_missing_it_is_told_where_it_is_published(tmp_path):
    with pytest.raises(
        TrainingError, match=r"published at https://download\.pytorch\.org/models/resnet18-f37072fd\.pth"
    ):
        read_weights(tmp_path / "resnet18-f37072fd.pth")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, zipped):
    trace = tmp_path / "executed"
    path = write(tmp_path / "net.pth", {**STATE, "x": Bomb(str(trace))}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(TrainingError, match=r"which could run code.*save its state_dict"):
        read_weights(path)
    path.write_bytes(pickle.dumps(Bomb(str(trace))))
    with pytest.raises(TrainingError, match=r"net\.pth is no"):
        read_weights(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content", [{}, [1, 2], {"epoch": 3}, {"model": {"lr": 0.1}}, {**STATE, "epoch": 3}, torch.ones(3)]
)
def test_a_file_without_weights_is_refused(tmp_path, content):
    with pytest.raises(TrainingError, match="holds no weights: names with tensors, alone or under model or state_dict"):
        read_weights(write(tmp_path / "net.pth", content))


def test_the_counter_of_an_averaged_model_is_no_weight(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)).state_dict()
    assert "n_averaged" in averaged

    assert set(read_weights(write(tmp_path / "net.pth", averaged)).state) == {"module.weight", "module.bias"}


def test_where_else_there_are_weights_is_said(tmp_path):
    with pytest.raises(TrainingError, match=r"there are some under 'net', 'ema': save that part alone"):
        read_weights(write(tmp_path / "net.pth", {"epoch": 3, "net": STATE, "ema": STATE, "args": {"lr": 0.1}}))
    (tmp_path / "best.pt").touch()
    with pytest.raises(TrainingError, match=r"its weights are in best\.pt beside it"):
        read_weights(write(tmp_path / "last.pt", {"stepper": {"weights": STATE}}))
