"""What layers are given beside hidden states: what it is found to be, and which models are refused."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmc.compress.arguments import Items, LayerArguments, Recorded, Repeated, Returned, Shared
from llmc.compress.entering import enter
from llmc.compress.rows import Carried, Rows
from llmc.errors import UserError

WIDTH = 6


class Layer(nn.Module):
    """Adds what it is given, and returns a second tensor."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, states: torch.Tensor, added: Any = None, shared: Any = None, **_more: Any) -> Any:
        if shared is not None:
            states = states + sum(shared.values())
            shared[str(self.number)] = states * 2
        states = states * 2 if added is None else states + added
        return states, states + self.number


class Model(nn.Module):
    """A model of three layers. between: makes the arguments of the next layer of (ids, embedded, layer, last output)."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.embedding, self.head, self.between = nn.Embedding(50, 4), nn.Linear(4, 50), between
        self.layers, self.order = nn.ModuleList(Layer(i) for i in range(3)), [0, 1, 2]
        self.config = SimpleNamespace(model_type="toy", get_text_config=lambda: self.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        embedded = self.embedding(input_ids)
        out, shared = (embedded, None), dict[str, torch.Tensor]()
        for i in self.order:
            states, given = self.between(SimpleNamespace(ids=input_ids, embedded=embedded, layer=i, out=out, shared=shared))
            out = self.layers[i](states, **given)
        self.last = out[0]
        logits: torch.Tensor = self.head(out[0])
        return logits


class Toy:
    """A skeleton whose weights are always there."""

    def __init__(self, between: Any) -> None:
        torch.manual_seed(0)
        self.model = Model(between)
        self.layers, self.layers_name, self.device = self.model.layers, "layers", torch.device("cpu")
        self.config, self.checkpoint = self.model.config, SimpleNamespace(folder="FOLDER")

    def outside(self) -> list[Any]:
        return []

    def leave(self) -> None:
        """Nothing was loaded."""

    @contextmanager
    def layer(self, index: int) -> Any:
        yield self.layers[index]


def walked(between: Any, folder: Path, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, list[LayerArguments]]:
    """(the states that the model's last layer returns, the same layer by layer in batches, the arguments)."""
    toy: Any = Toy(between)
    ids = torch.randint(0, 50, (5, WIDTH), generator=torch.Generator().manual_seed(0))
    given, carried = Rows(folder, "given", 5), Carried(folder, "carried", 5)
    with torch.no_grad():
        toy.model(ids, use_cache=False)
        wanted = toy.model.last
        entered = enter(toy, iter(ids.split(batch)), WIDTH, given)
        states = list(entered.states)
        for i, layer in enumerate(toy.layers):
            for n, part in enumerate(states):
                call = entered.layers[i].call(n * batch, n * batch + len(part), carried)
                out = layer(part, **call.kwargs)
                states[n] = out[0]
                call.carry(out)
    return wanted, torch.cat(states), entered.layers


CASES: dict[str, tuple[Any, Any]] = {
    "nothing": (lambda x: (x.out[0], {}), None),
    "the same for all": (lambda x: (x.out[0], {"added": torch.arange(4.0), "flag": True}), None),
    "in a tuple": (lambda x: (x.out[0], {"added": torch.ones(1), "rotary": (torch.ones(2), None)}), Items),
    "repeated": (lambda x: (x.out[0], {"added": torch.arange(4.0).expand(len(x.ids), WIDTH, 4)}), Repeated),
    "of the text": (lambda x: (x.out[0], {"added": x.embedded * 3}), Recorded),
    "of the text, for each layer": (lambda x: (x.out[0], {"added": x.embedded[:, :, x.layer, None]}), Recorded),
    "returned by the layer before": (lambda x: (x.out[0], {"added": x.out[1]}), Returned),
    "in a container": (lambda x: (x.out[0], {"shared": x.shared}), Shared),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_by_layer_is_the_whole_model(case: str, tmp_path: Path) -> None:
    between, kind = CASES[case]
    wanted, found, layers = walked(between, tmp_path)
    assert torch.equal(found, wanted)
    assert kind is None or any(isinstance(v, kind) for v in layers[-1].values.values())


@pytest.mark.parametrize(("between", "why"), [
    (lambda x: (x.out[0] / 2, {}), "changes the hidden states between layers 0 and 1"),
    (lambda x: (x.out[0], {"added": x.out[0].mean(-1, keepdim=True)}), "added, which is made from what other layers return"),
    (lambda x: (x.out[0], {"added": x.embedded.sum()}), "added, which depends on the text and does not belong"),
    (lambda x: (x.out[0], {"size": len(x.ids)}), "size, which is 1 for one text and 2 for two"),
    (lambda x: (x.out[0], {"cache": object()}), "cache, a object"),
    (lambda x: (x.out[0], {"first": None if int(x.ids[0, 0]) else torch.ones(1)}), "first, which is a NoneType or a Tensor"),
    (lambda x: (x.out[0], {str(int(x.ids[0, 0])): 1}), "for one text and other arguments"),
], ids=range(7))
def test_what_cannot_run_layer_by_layer_is_refused(between: Any, why: str, tmp_path: Path) -> None:
    def after_the_first(x: Any) -> Any:
        return between(x) if x.layer else (x.out[0], between(x)[1])

    with pytest.raises(UserError, match=f"'toy' of FOLDER layer by layer: .*{why}") as e:
        walked(after_the_first, tmp_path)
    assert "--method rtn" in e.value.hint


def test_without_a_place_for_them_arguments_of_the_text_are_refused() -> None:
    toy: Any = Toy(CASES["of the text"][0])
    with pytest.raises(UserError, match="depend on the text or on other layers"):
        enter(toy, iter(()), WIDTH)


@pytest.mark.parametrize(("order", "why"), [([0, 1, 2, 0, 1, 2], "runs layer 0 after 3 others"), ([0, 1], "runs 2 of its 3")])
def test_layers_that_do_not_run_once_each_are_refused(order: list[int], why: str, tmp_path: Path) -> None:
    toy: Any = Toy(CASES["nothing"][0])
    toy.model.order = order
    with pytest.raises(UserError, match=why):
        enter(toy, iter(()), WIDTH, Rows(tmp_path, "given", 0))


# ---------------------------------------------------------------------------------------------------- files


def test_rows_are_read_again_and_damage_is_seen(tmp_path: Path) -> None:
    value = torch.randn(5, 3, 2)
    rows = Rows(tmp_path, "given", 5)
    for first, part in ((0, value[:2]), (2, value[2:4].bfloat16().float()), (4, value[4:])):
        rows.write("a", first, part, -1, 2)
    rows.write("late", 0, torch.zeros(5, dtype=torch.bool), 1, 2)
    record = rows.settle(1)
    assert list(record) == ["a"]  # layer 1 is not finished
    again = Rows(tmp_path, "given", 5)
    assert again.restore(record)
    assert torch.equal(again.read("a", 1, 4), rows.read("a", 1, 4))
    with pytest.raises(RuntimeError, match="after one of float32"):
        rows.write("a", 0, value.half(), -1, 2)
    file = tmp_path / "given.a.bin"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert not Rows(tmp_path, "given", 5).restore(record)
    rows.forget(3)
    assert not list(tmp_path.iterdir())


def test_a_container_keeps_what_no_layer_changed(tmp_path: Path) -> None:
    """The second layer adds a key: the tensor under the first one stays in its file."""
    node = Shared(0, Items({}, (), ()), 2)
    carried = Carried(tmp_path, "carried", 1)
    for i in range(2):
        call = LayerArguments(i, {"shared": node}).call(0, 1, carried)
        assert not call.changed()
        call.kwargs["shared"][f"key {i}"] = (torch.full((1, 2), float(i)), None)
        assert call.changed() == [0]
        call.carry(torch.zeros(1))
    assert sorted(carried.stored) == ["shared-0-0-0-of-0", "shared-0-1-0-of-1"]
    again = Carried(tmp_path, "carried", 1)
    assert again.restore(carried.settle(2))
    found = LayerArguments(2, {"shared": node}).of(0, 1, again)["shared"]
    assert {k: float(v[0].sum()) for k, v in found.items()} == {"key 0": 0.0, "key 1": 2.0}
