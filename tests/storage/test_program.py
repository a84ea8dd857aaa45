"""Programs on disk: they come back equal, and a hostile folder runs nothing and is named."""

from __future__ import annotations

import copy
import io
import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.errors import ArtifactError, ExportError, GraphPruneError, UnsupportedError
from graphprune.ir.batches import second_inputs
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark
from graphprune.storage.arguments import encode
from graphprune.storage.folders import sha256
from graphprune.storage.program import digest, load, save, save_files

Captured = Callable[[str], Program]


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-t5", "tiny-mixtral", "tiny-cnn", "tiny-mlp"])
def test_a_program_comes_back_equal(name: str, captured: Captured, tmp_path: Path) -> None:
    program = replace(
        captured(name).record({"pass": "none", "ratio": 0.5}),
        frozen=frozenset(["a", "b"]),
        overlapping=frozenset(["c"]),
        zeroed=frozenset(["d"]),
        axis_names={"w[0]": "w[0].1"},
        quantization=Mark("int8-dynamic", ("e",)),
        report={"passes": []},
    )
    save(program, tmp_path / "p")
    again = load(tmp_path / "p")
    assert str(again.forward.graph) == str(program.forward.graph)
    assert again.tensors.keys() == program.tensors.keys()
    assert all(torch.equal(again.tensors[k], t) for k, t in program.tensors.items())
    assert (again.parameters, again.aliases) == (program.parameters, program.aliases)
    assert again.history == program.history
    for what in (
        "model", "frozen", "overlapping", "zeroed", "axis_names", "quantization", "report"
    ):  # fmt: skip
        assert getattr(again, what) == getattr(program, what)
    assert again.forward.dynamic == program.forward.dynamic
    flat = second_inputs(program.forward)
    for a, b in zip(program.run(flat), again.run(flat), strict=True):
        assert torch.equal(a, b)
    named = dict(zip(program.forward.input_names, flat, strict=True))
    assert type(again(**named)) is type(program(**named))
    for old, new in zip(program.forward.graph.nodes, again.forward.graph.nodes, strict=True):
        if old.op == "call_function" and isinstance(old.meta["val"], Tensor):
            assert len(old.meta["val"].shape) == len(new.meta["val"].shape)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-mixtral", "tiny-cnn"])
def test_groups_of_axes_keep_their_names(name: str, captured: Captured, tmp_path: Path) -> None:
    program = captured(name)
    save(program, tmp_path / "saved")
    expected = [group.id for group in axis_groups(program)]
    assert [group.id for group in axis_groups(load(tmp_path / "saved"))] == expected


def test_a_wrong_list_of_tensors_is_refused(captured: Captured, tmp_path: Path) -> None:
    save(captured("tiny-mlp"), tmp_path / "saved")
    file = tmp_path / "saved" / "program.json"
    data = json.loads(file.read_text())
    for order in (data["order"][1:], [*data["order"], "more"], data["order"][:1] * 6):
        file.write_text(json.dumps({**data, "order": order}))
        with pytest.raises(ArtifactError, match="the list of its tensors"):
            load(tmp_path / "saved")
    del data["order"]  # as earlier versions wrote it
    file.write_text(json.dumps(data))
    load(tmp_path / "saved")


class Views(nn.Module):
    """Tensors that share memory, are not contiguous, or have no elements."""

    whole: Tensor
    part: Tensor
    turned: Tensor
    none: Tensor

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(6, 4)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[2:4])
        self.register_buffer("turned", torch.randn(4, 3).T)
        self.register_buffer("none", torch.zeros(0, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rest = x.sum() * self.turned + (x.sum() * self.none).sum()
        return F.linear(x, self.whole), F.linear(x, self.part), rest


def test_views_and_empty_tensors_are_saved(tmp_path: Path) -> None:
    program = capture(Views(), (torch.randn(2, 4),))
    whole = program.tensors["whole"]
    program = program.with_tensors({"part": whole[2:4], "turned": whole[:3].T})
    save(program, tmp_path / "p")
    again = load(tmp_path / "p")
    for a, b in zip(
        program.run(program.forward.example), again.run(program.forward.example), strict=True
    ):
        assert torch.equal(a, b)


def test_a_program_that_calls_another_library_is_not_saved(
    captured: Captured, tmp_path: Path
) -> None:
    program = captured("tiny-mlp")
    graphs = program.fork_graphs()
    node = next(n for n in graphs["forward"].nodes if n.op == "call_function")
    node.target = torch.ops.aten.relu_.default
    broken = replace(
        program, entries={"forward": replace(program.forward, graph=graphs["forward"])}
    )
    with pytest.raises(UnsupportedError, match=r"relu_"):
        save(broken, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(captured: Captured, tmp_path: Path) -> Path:
    save(captured("tiny-mlp"), tmp_path / "p")
    return tmp_path / "p"


Edit = Callable[[Any], None]


def edit(folder: Path, change: Edit) -> None:
    """Change program.json, and keep the hashes right: the attacker can compute them too."""
    data = json.loads((folder / "program.json").read_text())
    change(data)
    for name in data["sha256"]:
        data["sha256"][name] = sha256(folder / name)
    (folder / "program.json").write_text(json.dumps(data))


def nodes(data: Any) -> Any:
    return data["entries"]["forward"]["nodes"]


def renamed(data: Any, old: str, new: str) -> None:
    """Rename a node everywhere, so that only its new name is wrong."""
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data))
    for key, value in items:
        if value == old and key in ("name", "node", "input"):
            data[key] = new
        elif isinstance(value, dict | list):
            renamed(value, old, new)
        if key == old:
            data[new] = data.pop(old)


def first(data: Any, op: str) -> Any:
    return next(n for n in nodes(data) if n["op"] == op)


INJECTION = '"); __import__("os").system("touch hacked"); ("'

EDITS: dict[str, Edit] = {
    "unknown target": lambda d: first(d, "call_function").update(target="os.system"),
    "writing target": lambda d: first(d, "call_function").update(target="aten::zero_.default"),
    "target that trusts indices": lambda d: first(d, "call_function").update(
        target="aten::_convert_indices_from_coo_to_csr.default",
        args=[{"node": "x"}, 4],
    ),
    "target that trusts places": lambda d: first(d, "call_function").update(
        target="aten::_unsafe_index.Tensor", args=[{"node": "x"}, [{"node": "x"}]]
    ),
    "target of a library": lambda d: first(d, "call_function").update(target="x::y.default"),
    "kind of node": lambda d: first(d, "call_function").update(op="call_module"),
    "method": lambda d: first(d, "call_function").update(op="call_method", target="share_memory_"),
    "code as a node's name": lambda d: renamed(d, "linear", INJECTION),
    "code as an input's name": lambda d: renamed(d["entries"], "x", INJECTION),
    "keyword as a node's name": lambda d: renamed(d, "linear", "import"),
    "code as a tensor": lambda d: first(d, "get_attr").update(target=INJECTION),
    "tensor that is not there": lambda d: first(d, "get_attr").update(target="missing"),
    "code as a keyword": lambda d: first(d, "call_function").update(kwargs={INJECTION: 1}),
    "node before it is made": lambda d: first(d, "call_function").update(args=[{"node": "output"}]),
    "argument of another kind": lambda d: first(d, "call_function").update(args=[{"pickle": "x"}]),
    "argument that does not fit": lambda d: first(d, "call_function").update(args=[1]),
    "two nodes of one name": lambda d: nodes(d).insert(1, dict(nodes(d)[0])),
    "no output": lambda d: nodes(d).pop(),
    "an alias of nothing": lambda d: d["aliases"].update(a="missing"),
    "code as an alias": lambda d: d["aliases"].update({INJECTION: d["parameters"][0]}),
    "a parameter that is not there": lambda d: d["parameters"].append("missing"),
    "no entry": lambda d: d.update(entries={}),
    "no key": lambda d: d.pop("history"),
    "a list for an entry": lambda d: d["entries"].update(forward=[]),
    "an argument too many": lambda d: d["entries"]["forward"]["arguments"].pop(),
    "code as an argument": lambda d: d["entries"]["forward"]["arguments"][0]["leaves"].append(
        {"input": INJECTION}
    ),
    "a container by import": lambda d: d["entries"]["forward"].update(outputs={"os.system": []}),
    "too many outputs": lambda d: d["entries"]["forward"].update(outputs=[]),
    "a version to come": lambda d: d.update(version=99),
    "another format": lambda d: d.update(format="x"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_hostile_graph_is_refused(
    name: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(saved, EDITS[name])
    monkeypatch.chdir(saved)
    with pytest.raises(ArtifactError, match=r"program\.json"):
        load(saved)
    assert not (saved / "hacked").exists()


class Payload:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("hacked"),))


@pytest.mark.parametrize("file", ["tensors.safetensors", "examples.safetensors", "program.json"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "truncated", "empty", "random", "missing"])
def test_a_file_that_is_not_what_it_says_is_named(
    file: str, kind: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved / file
    data = path.read_bytes()
    if kind == "torch":
        torch.save({"x": Payload()}, path)
    elif kind == "missing":
        path.unlink()
    else:
        contents = {
            "pickle": pickle.dumps(Payload()),
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "random": bytes(range(256)) * 9,
        }
        path.write_bytes(contents[kind])
    if file != "program.json" and kind != "missing":
        edit(saved, lambda d: None)
    monkeypatch.chdir(saved)
    with pytest.raises(ArtifactError, match=file.replace(".", r"\.")):
        load(saved)
    assert not (saved / "hacked").exists()


def test_changed_weights_are_noticed(saved: Path) -> None:
    path = saved / "tensors.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"tensors\.safetensors.*SHA-256"):
        load(saved)


def test_deep_nesting_is_an_artifact_error(saved: Path) -> None:
    (saved / "program.json").write_text("[" * 200_000)
    with pytest.raises(ArtifactError, match=r"program\.json"):
        load(saved)


def test_the_loader_never_reaches_pickle(saved: Path) -> None:
    """In a fresh process: loading a program leaves pickle.loads and torch.load uncalled."""
    script = f"""
import pickle, torch
from pathlib import Path
def refuse(*a, **k): raise SystemExit("pickle was used")
from graphprune.storage.program import load
pickle.load = pickle.loads = torch.load = torch.export.load = refuse
load(Path({str(saved)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_saving_over_something_else_is_refused(captured: Captured, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="did not write it"):
        save(captured("tiny-mlp"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_program_is_replaced_as_a_whole(captured: Captured, saved: Path) -> None:
    save(captured("tiny-cnn"), saved)
    assert load(saved).model == "Cnn"


@pytest.mark.skipif(sys.platform == "win32", reason="limits on files are POSIX")
def test_a_full_disk_leaves_nothing(captured: Captured, tmp_path: Path) -> None:
    import resource

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ExportError, match="too large"):
            save(captured("tiny-mlp"), tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert list(tmp_path.iterdir()) == []


def test_every_error_is_of_ours(saved: Path) -> None:
    """Cut program.json anywhere: never an error that a user of the library would not expect."""
    data = (saved / "program.json").read_text()
    for end in _cuts(len(data)):
        (saved / "program.json").write_text(data[:end])
        with pytest.raises(GraphPruneError):
            load(saved)


def _cuts(length: int) -> Iterator[int]:
    return iter(range(0, length - 1, max(1, length // 40)))


# --- what a tampered or moved folder may not do ------------------------------------------------


def _artifact(folder: Path, program: Program) -> Path:
    """A folder with a manifest, as far as reading the program looks at it."""
    (folder / "program").mkdir(parents=True)
    save_files(program, folder / "program")
    _seal(folder)
    return folder


def _seal(folder: Path, leave_out: str = "") -> None:
    """Write hashes that fit the files, as whoever tampers with them would."""
    files = [f for f in (folder / "program").iterdir() if f.name != leave_out]
    hashes = {f"program/{f.name}": sha256(f) for f in files}
    manifest = {"format": "graphprune-artifact", "sha256": hashes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["program.json", "tensors.safetensors", "examples.safetensors"])
def test_a_manifest_without_a_hash_of_the_program_is_refused(
    name: str, captured: Captured, tmp_path: Path
) -> None:
    folder = _artifact(tmp_path / "a", captured("tiny-mlp"))
    load(folder)
    _seal(folder, leave_out=name)
    with pytest.raises(ArtifactError, match=f"has no hash of 'program/{name}'"):
        load(folder)


def test_links_are_not_followed(captured: Captured, tmp_path: Path) -> None:
    folder = _artifact(tmp_path / "a", captured("tiny-mlp"))
    (folder / "program").rename(tmp_path / "elsewhere")
    (folder / "program").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(ArtifactError, match="is a link, or lies in one"):
        load(folder)
    # The folder itself may be reached by one.
    (folder / "program").unlink()
    (tmp_path / "elsewhere").rename(folder / "program")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    load(tmp_path / "link")


@pytest.mark.parametrize("kind", ["artifact", "program"])
def test_a_digest_from_elsewhere_shows_another_author(
    kind: str, captured: Captured, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    program = captured("tiny-mlp")
    if kind == "artifact":
        _artifact(folder, program)
    else:
        save(program, folder)
    published = digest(folder)
    load(folder, published)
    name = "layers.0.bias"
    changed = program.with_tensors({name: program.tensors[name] + 1})
    if kind == "artifact":
        save_files(changed, folder / "program")
        _seal(folder)
    else:
        save(changed, folder)
    load(folder)  # all hashes inside fit
    with pytest.raises(ArtifactError, match="it is another artifact, or somebody changed it"):
        load(folder, published)
    with pytest.raises(ArtifactError, match="expect is 'sha256:' and 64 hex digits"):
        load(folder, "abc")
    with pytest.raises(ArtifactError, match="not a folder that graphprune wrote"):
        load(tmp_path, published)


def _with_calls(folder: Path, calls: list[tuple[str, list[Any]]]) -> None:
    """Put calls of Python's arithmetic in front of the output, each on the one before it."""
    file = folder / "program.json"
    data = json.loads(file.read_text())
    nodes = data["entries"]["forward"]["nodes"]
    for i, (target, args) in enumerate(calls):
        given = [{"node": f"n{i - 1}"} if a is None else encode(a) for a in args]
        nodes.insert(-1, {"op": "call_function", "name": f"n{i}", "target": target, "args": given})
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "calls",
    [
        [("operator.pow", [10, 10**9])],
        [("operator.mul", [10**12, 10**12])],
        [("operator.mul", [3, 3])] + [("operator.mul", [None, None])] * 64,
        [("operator.pow", [3, 3])] + [("operator.pow", [None, None])] * 8,
        [("operator.mul", [[0, 0], 10**12])],
        [("operator.add", ["a", "b"])],
    ],
)
@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs an alarm to end what hangs")
def test_numbers_without_end_are_refused(
    calls: list[tuple[str, list[Any]]], captured: Captured, tmp_path: Path
) -> None:
    save(captured("tiny-mlp"), tmp_path / "p")
    _with_calls(tmp_path / "p", calls)
    signal.alarm(60)
    try:
        with pytest.raises(ArtifactError, match=r"64 bits|sizes, which are numbers"):
            load(tmp_path / "p")
    finally:
        signal.alarm(0)


class Keys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        names = ["a/b", "c[0]", "d e", "f(g)", "h'i", "1,2", "ümlaut", "{x}", "$"]
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def test_names_of_modules_that_are_no_identifiers(tmp_path: Path) -> None:
    program = capture(Keys().eval(), (torch.randn(2, 4),))
    save(program, tmp_path / "p")
    again = load(tmp_path / "p")
    x = torch.randn(5, 4)
    assert torch.equal(again(x), program(x))


@pytest.mark.parametrize("name", ['a"b', "a\\", "a\nb", "a..b", "", 'x", __import__("os")) #'])
def test_names_that_could_end_a_string_are_refused(
    name: str, captured: Captured, tmp_path: Path
) -> None:
    program = captured("tiny-mlp")
    save(program, tmp_path / "p")
    file = tmp_path / "p" / "program.json"
    data = json.loads(file.read_text())
    data["aliases"] = {name: "layers.0.bias"}
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="is not a tensor name"):
        load(tmp_path / "p")


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_a_module_travels_as_its_saved_form(how: str, captured: Captured) -> None:
    module = ProgramModule(captured("tiny-encoder"))
    next(module.parameters()).requires_grad_(False)
    module.train()
    if how == "deepcopy":
        again = copy.deepcopy(module)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert again.training
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in module.parameters()
    ]
    inputs = dict(zip(module._entry.input_names, module._entry.example, strict=True))
    with torch.no_grad():
        expected, actual = module.eval()(**inputs), again.eval()(**inputs)
    assert torch.equal(expected, actual)
    with torch.no_grad():  # a copy, not a view
        next(again.parameters()).zero_()
    assert bool(next(module.parameters()).any())
