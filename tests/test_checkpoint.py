"""Checkpoint files: complete or not there, verified, and only for the model that they belong to."""

import functools
import os
import pickle
import stat
import subprocess
import sys
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import funcprecond as fp
from tests import problems
from tests.equality import assert_same
from tests.problems import initialised, normal, seeded

ROOT = Path(__file__).parents[1]
TREE = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7)}


def names(folder):
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------------------------- damaged files
@functools.cache
def intact(folder: Path) -> bytes:
    fp.save(folder / "intact", TREE)
    return (folder / "intact").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def loads_right_or_says_so(path):
    """Load a damaged file: the right values, or a ValueError that names the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = fp.load(path, TREE)
        except ValueError as error:
            assert str(path) in str(error)
            assert "fp.save" in str(error)
            assert len(str(error).splitlines()) == 1
            return False
    assert_same(found, TREE)
    return True


def flipped(content, place, bits):
    return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


def test_a_flipped_byte_is_harmless_or_refused(folder):
    """Damage to the checksum's own label leaves the checksums of the zip file."""
    content = intact(folder)
    label = content.rindex(b"funcprecond")
    for place in range(0, len(content), 5):
        (folder / "x").write_bytes(flipped(content, place, 1 << place % 8))
        assert place >= label - 2 or not loads_right_or_says_so(folder / "x")


def test_every_flipped_byte_of_the_values_is_refused_in_an_older_file(folder):
    torch.save(TREE, folder / "older")
    content, values = (folder / "older").read_bytes(), TREE["weight"].numpy().tobytes()
    start = content.index(values)
    for place in range(start, start + len(values)):
        (folder / "x").write_bytes(flipped(content, place, 1 << place % 8))
        with pytest.raises(ValueError, match=r"x is damaged \(the checksum .*/data/0' is wrong\)"):
            fp.load(folder / "x", TREE)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_damage_is_harmless_or_refused(folder, data):
    content = intact(folder)
    places = st.integers(0, len(content) - 1)
    damaged = content[: data.draw(st.none() | places)]
    for place in data.draw(st.lists(places, max_size=4)):
        if place < len(damaged):
            damaged = flipped(damaged, place, data.draw(st.integers(1, 255)))
    (folder / "x").write_bytes(damaged)
    loads_right_or_says_so(folder / "x")


def foreign(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("weight: 3\n")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(TREE))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "<xml/>")
    elif kind == "list":
        torch.save([torch.ones(2)], path)
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "nested":
        torch.save({"model": {"weight": torch.ones(2)}, "epoch": 3}, path)
    elif kind == "meta":
        torch.save({k: x.to("meta") for k, x in TREE.items()}, path)
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "is empty"),
        ("text", "another format"),
        ("pickle", "another format"),
        ("zip", "not a tensor"),
        ("list", "contains a list"),
        ("module", "not a tensor"),
        ("nested", "a dict under the name 'model'"),
        ("meta", "without memory"),
    ],
)
def test_a_file_of_something_else_says_what_it_is(tmp_path, kind, words):
    foreign(tmp_path / "x", kind)
    assert not loads_right_or_says_so(tmp_path / "x")
    with pytest.raises(ValueError, match=words):
        fp.load(tmp_path / "x", TREE)


def test_a_file_of_plain_torch_save_loads_as_before(tmp_path):
    torch.save(TREE, tmp_path / "x")
    assert loads_right_or_says_so(tmp_path / "x")


def test_a_missing_file_and_a_folder_keep_their_own_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        fp.load(tmp_path / "nothing", TREE)
    with pytest.raises(IsADirectoryError):
        fp.load(tmp_path, TREE)


def test_it_is_a_zip_file_without_a_fault(tmp_path):
    fp.save(tmp_path / "x", TREE)
    with zipfile.ZipFile(tmp_path / "x") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"funcprecond sha256 ")


# ------------------------------------------------------------------------------- writing of files
SAVER = """
import sys, torch, funcprecond as fp
for i in range(60):
    fp.save(sys.argv[1], {"a": torch.full((20_000,), -1.0), "b": torch.full((5,), -1.0)})
    print(flush=True)
"""


def test_two_processes_save_to_one_path_and_every_reader_finds_a_whole_file(tmp_path):
    path, like = tmp_path / "x", {"a": torch.zeros(20_000), "b": torch.zeros(5)}
    command = [sys.executable, "-c", SAVER, path]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    seen, here = set(), 0
    while other.poll() is None:
        here += 1
        fp.save(path, {k: torch.full_like(x, float(here)) for k, x in like.items()})
        found = fp.load(path, like)
        (value,) = found["a"].unique().tolist()
        assert found["b"].tolist() == [value] * 5
        seen.add(value)
    other.stdout.close()
    assert other.returncode == 0
    assert here > 3
    assert max(seen) > 0
    assert names(tmp_path) == ["x"]


def test_threads_save_to_one_path(tmp_path):
    gate = threading.Barrier(4)

    def work(value):
        gate.wait()
        for _ in range(10):
            fp.save(tmp_path / "x", {"a": torch.full((1000,), float(value))})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    found = fp.load(tmp_path / "x", {"a": torch.zeros(1000)})["a"]
    assert len(found.unique()) == 1
    assert names(tmp_path) == ["x"]


def test_the_file_is_on_disk_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(*arguments):
        done.append("name")
        replace(*arguments)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    fp.save(tmp_path / "x", TREE)
    assert done == ["file", "name", "folder"]


LIMITED = """
import os, resource, signal, sys, torch, funcprecond as fp
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (0, 1000, 399_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        fp.save(sys.argv[1], {"a": torch.randn(100_000)})
    except OSError as error:
        sys.stderr.write(f"{error}\\n")
    assert os.listdir(os.path.dirname(sys.argv[1])) == ["x"]
"""


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path):
    fp.save(tmp_path / "x", {"a": torch.ones(1)})
    command = [sys.executable, "-c", LIMITED, tmp_path / "x"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    sentences = process.stderr.splitlines()
    assert len(sentences) == 3
    assert all("the tree was not saved (File too large)" in line for line in sentences)
    assert all(str(tmp_path / "x") in line for line in sentences)
    assert fp.load(tmp_path / "x", {"a": torch.zeros(1)})["a"] == 1


def test_a_folder_or_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(IsADirectoryError, match="the tree was not saved") as found:
        fp.save(tmp_path, TREE)
    assert str(tmp_path) in str(found.value)
    with pytest.raises(FileNotFoundError, match="existing folder") as found:
        fp.save(tmp_path / "new" / "x", TREE)
    assert str(tmp_path / "new" / "x") in str(found.value)
    assert not names(tmp_path)


def test_a_folder_that_may_not_be_written_is_a_sentence(tmp_path, monkeypatch):
    # The superuser may write everywhere, so that the system's answer is put in its place.
    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=r"not saved \(Permission denied\)"):
        fp.save(tmp_path / "x", TREE)


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fp.save(tmp_path / "x", TREE)
    assert not names(tmp_path)


def test_a_link_goes_on_pointing_to_the_file(tmp_path):
    (tmp_path / "link").symlink_to("x")
    fp.save(tmp_path / "link", TREE)
    assert (tmp_path / "link").is_symlink()
    assert loads_right_or_says_so(tmp_path / "x")


def test_a_file_has_the_permissions_of_other_new_files(tmp_path):
    fp.save(tmp_path / "x", TREE)
    (tmp_path / "y").write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


# ---------------------------------------------------------------------- tensors that are not whole
class Part(torch.Tensor):
    """What matters of a DTensor: it wraps a part of the whole."""

    @staticmethod
    def __new__(cls, local):
        return torch.Tensor._make_wrapper_subclass(cls, (2 * local.shape[0],), dtype=local.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func)


def test_a_distributed_tensor_is_refused(tmp_path):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        tensor = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"'layer.w' is a DTensor.*full_tensor\(\)"):
            fp.save(tmp_path / "x", {"layer": {"w": tensor}})
        assert not names(tmp_path)
        fp.save(tmp_path / "x", {"layer": {"w": tensor.full_tensor()}})
        with pytest.raises(ValueError, match=r"'layer.w' is a whole tensor.*distribute_tensor"):
            fp.load(tmp_path / "x", {"layer": {"w": tensor}})
    finally:
        destroy_process_group()


def test_other_tensors_without_values_of_their_own_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'w' is a Part that contains other tensors"):
        fp.save(tmp_path / "x", {"w": Part(torch.ones(2))})
    with pytest.raises(ValueError, match=r"'w' is on the device 'meta'"):
        fp.save(tmp_path / "x", {"w": torch.ones(2, device="meta")})

    def inside(x):
        fp.save(tmp_path / "x", {"w": x})
        return x.sum()

    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(TypeError, match=r"outside of torch.func transforms"):
            transform(inside)(torch.ones(2))
    assert not names(tmp_path)


def test_parameters_and_subclasses_are_saved_as_their_values(tmp_path):
    class Named(torch.Tensor):
        pass

    tensors = {"p": nn.Parameter(torch.ones(2)), "s": torch.ones(2).as_subclass(Named)}
    fp.save(tmp_path / "x", tensors)
    found = fp.load(tmp_path / "x", {k: torch.zeros(2) for k in tensors})
    assert all(type(x) is torch.Tensor and torch.equal(x, torch.ones(2)) for x in found.values())


def test_a_like_on_the_meta_device_gives_its_structure_only(tmp_path):
    module = problems.mlp_module()
    params = {k: p.detach().clone() for k, p in module.named_parameters()}
    fp.save(tmp_path / "x", params)
    like = dict(module.to("meta").named_parameters())
    assert_same(fp.load(tmp_path / "x", like), params)
    assert_same(fp.from_dict({k: p.detach() for k, p in like.items()}, params), params)


def test_what_an_empty_dict_takes_goes_to_the_device_of_its_neighbours():
    like = {
        "generator": torch.zeros(2),
        "state": {"left": {}, "step": torch.zeros((), device="meta")},
        "other": {"right": {}, "step": torch.zeros(())},
    }
    flat = {
        "generator": torch.ones(2),
        "state.step": torch.ones(()),
        "state.left.w": torch.ones(2, device="meta"),
        "other.step": torch.ones(()),
        "other.right.w": torch.ones(2),
    }
    found = fp.from_dict(like, flat)
    assert found["state"]["left"]["w"].device.type == "meta"
    assert found["other"]["right"]["w"].device.type == "cpu"


def test_an_empty_tree_takes_every_tensor():
    flat = {"a": torch.ones(2), "b.c": torch.zeros(1)}
    assert_same(fp.from_dict({}, flat), flat)


def test_long_lists_of_names_are_cut():
    with pytest.raises(KeyError, match=r"missing \['0', .* and 90 more, unknown none") as found:
        fp.from_dict({str(i): torch.zeros(1) for i in range(100)}, {})
    assert len(str(found.value)) < 300


# ------------------------------------------------------------------------------ states of layers
class Net(nn.Module):
    """Layers of every kind that has a block, and parameters without one."""

    def __init__(self, width=4, extra=False):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, width, 2, groups=2)
        self.back = nn.ConvTranspose1d(width, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.plain = nn.Linear(4, width, bias=False)
        self.pair = nn.Bilinear(width, 4, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.extra = nn.Linear(3, 3) if extra else nn.Identity()

    def forward(self, tokens):
        x = self.embed(tokens).mT
        x = self.norm(self.back(self.conv(x)).mT).mean(1)
        return self.extra(self.scale * self.pair(self.plain(x), x))


def stepped(module, opt):
    """The parameters and the state of a method after two steps."""
    module = initialised(module)
    problem = fp.problem(module, fp.losses.cross_entropy)
    batch = (torch.arange(12).reshape(3, 4) % 5, torch.tensor([0, 1, 2]))
    params, state = problem.params, opt.init(problem.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(2):
            evidence = fp.observe(problem, params, batch, opt.needs(t), generator=seeded(t))
            state, direction = opt.update(state, evidence.grads, evidence)
            params = {k: p - 0.01 * direction[k] for k, p in params.items()}
    return params, state


LAYERED = {
    "kfac": fp.kfac(),
    "kfac of one batch": fp.kfac(decay=None, damping_split="pi"),
    "kfac with short factors": fp.kfac(max_dim=3),
    "ekfac": fp.ekfac(),
    "kflr": fp.kflr(),
    "skfac": fp.skfac(),
    "foof": fp.foof(),
    "singd": fp.singd(),
    "diagonal singd": fp.singd(structure="diagonal"),
    "diagonal_ng": fp.diagonal_ng(),
    "unit_ng": fp.unit_ng(),
    "unit_ng of borders": fp.unit_ng(quasi_diagonal=True),
    "eva": fp.eva(),
    "adaptive_kfac": fp.adaptive_kfac(),
    "seng": fp.seng(),
    "seng with a window": fp.seng(sketch=2, rank=2, window=2),
    "partition": fp.partition(
        [("embed.*", "a"), ("norm.*", "a"), ("*", "b")], a=fp.adam(), b=fp.kfac()
    ),
}


@pytest.mark.parametrize("name", LAYERED)
def test_the_state_of_a_method_of_layers_loads_into_its_own_model_only(name, tmp_path):
    opt = LAYERED[name]
    params, state = stepped(Net(), opt)
    fp.save(tmp_path / "x", state)
    assert_same(fp.load(tmp_path / "x", opt.init(params)), state)

    renamed = {k.replace("plain", "flat"): p for k, p in params.items()}
    with pytest.raises((KeyError, ValueError), match=r"plain\.weight") as found:
        fp.load(tmp_path / "x", opt.init(renamed))
    assert all(word in str(found.value) for word in (str(tmp_path / "x"), "flat.weight"))

    wide = dict(Net(width=6).double().named_parameters())
    with pytest.raises(ValueError, match=r"(conv|back|plain|pair)\.") as found:
        fp.load(tmp_path / "x", opt.init(wide))
    assert str(tmp_path / "x") in str(found.value)

    deep = dict(Net(extra=True).double().named_parameters())
    with pytest.raises((KeyError, ValueError), match=r"extra\.weight"):
        fp.load(tmp_path / "x", opt.init(deep))
    fp.save(tmp_path / "deep", stepped(Net(extra=True), opt)[1])
    with pytest.raises((KeyError, ValueError), match=r"extra\.weight"):
        fp.load(tmp_path / "deep", opt.init(params))


def test_a_transposed_weight_is_another_model():
    opt = fp.kfac()
    wide, tall = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)
    toy = problems.Toy(
        fp.problem(initialised(wide), fp.losses.MSE()), ((normal((5, 3)), normal((5, 4))),)
    )
    state = problems.train(toy, opt, 1)[1]
    with pytest.raises(ValueError, match=r"'weight' is for 1 matrices of shape \(4, 3\)"):
        fp.from_dict(opt.init(dict(tall.double().named_parameters())), fp.to_dict(state))


def test_an_untrained_state_and_a_stack_of_states_load():
    opt, toy = fp.kfac(), problems.mlp()
    empty = opt.init(toy.params)
    assert_same(fp.from_dict(opt.init(toy.params), fp.to_dict(empty)), empty)
    state = problems.train(toy, opt, 1)[1]
    pair = fp.tree.map(lambda x: torch.stack([x, 2 * x]), state)
    stacked = {k: torch.stack([p, p]) for k, p in toy.params.items()}
    like = torch.vmap(opt.init)(stacked)
    assert_same(fp.from_dict(like, fp.to_dict(pair)), pair)
