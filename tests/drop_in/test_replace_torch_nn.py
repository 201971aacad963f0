"""replace(model): torch.nn modules become ours in place."""

import copy

import pytest
import torch
from nn_oracle import slow_path
from torch.nn.utils import parametrize

import fastattn
from fastattn import nn
from fastattn.drop_in.linear import LINEAR

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

E, H, FF = 16, 4, 24


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, E)
        layer = torch.nn.TransformerEncoderLayer(E, H, FF, batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(E))
        self.attend = torch.nn.MultiheadAttention(E, H, batch_first=True)
        self.norm = torch.nn.RMSNorm(E)
        self.head = torch.nn.Linear(E, 3)

    def forward(self, tokens):
        x = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        return self.head(self.norm(x + self.attend(x, x, x)[0])).mean(1)


def test_results_parameters_and_modes_stay():
    torch.manual_seed(0)
    model = Classifier().eval()
    model.encoder.layers[1].train()
    fired = []
    model.encoder.layers[0].linear1.register_forward_hook(lambda *args: fired.append(True))
    tokens = torch.randint(1, 11, (3, 7))
    tokens[1, 4:] = 0
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    model.encoder.layers[1].self_attn.dropout = 0.0
    parameters, modules = list(model.parameters()), list(model.modules())
    modes = [m.training for m in modules]
    with slow_path():
        expected = model(tokens)
    fired.clear()
    report = fastattn.replace(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(model(tokens), expected)
    assert fired
    assert type(model.encoder) is nn.TransformerEncoder
    assert type(model.encoder.layers[1].self_attn) is nn.MultiheadAttention
    assert type(model.norm) is nn.RMSNorm
    assert type(model.head) is LINEAR
    assert report.replaced["encoder.norm"] == "LayerNorm"
    assert len(report.replaced) == 13
    assert report.left == {}
    assert "13 modules replaced, 0 left alone" in str(report)
    assert fastattn.replace(model).replaced == {}


def test_copies_and_state_dict_after_it():
    model = Classifier()
    state = copy.deepcopy(model.state_dict())
    fastattn.replace(model)
    twin = copy.deepcopy(model)
    assert type(twin.attend) is nn.MultiheadAttention
    assert list(twin.state_dict()) == list(state)
    Classifier().load_state_dict(twin.state_dict())


def test_the_model_itself():
    model = torch.nn.Transformer(E, H, 1, 1, FF)
    report = fastattn.replace(model)
    assert type(model) is nn.Transformer
    assert report.replaced[""] == "Transformer"


def test_what_is_left_alone():
    class Mine(torch.nn.TransformerEncoderLayer):
        pass

    patched, changed = torch.nn.LayerNorm(E), torch.nn.LayerNorm(E)
    patched.forward = lambda x: x
    parametrize.register_parametrization(changed, "weight", torch.nn.Tanh())
    model = torch.nn.ModuleDict(
        {"mine": Mine(E, H, FF), "patched": patched, "changed": changed, "ours": nn.LayerNorm(E)}
    )
    report = fastattn.replace(model)
    assert type(model["mine"]) is Mine
    assert type(model["patched"]) is torch.nn.LayerNorm
    assert set(report.left) == {"mine", "patched", "changed"}
    assert "Mine is a subclass" in report.left["mine"]
    assert "forward was replaced" in report.left["patched"]
    assert type(model["mine"].self_attn) is nn.MultiheadAttention
    assert "mine: left alone" in str(report)


def test_only():
    model = Classifier()
    report = fastattn.replace(model, only=torch.nn.LayerNorm)
    assert set(report.replaced.values()) == {"LayerNorm"}
    assert type(model.attend) is torch.nn.MultiheadAttention
    assert report.left == {}
    report = fastattn.replace(model, only=[torch.nn.RMSNorm, torch.nn.MultiheadAttention])
    assert set(report.replaced.values()) == {"RMSNorm", "MultiheadAttention"}


def test_errors():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fastattn.replace("model")
    for wrong in (torch.nn.Linear, "Linear"):
        with pytest.raises(ValueError, match=r"only must name classes among torch.nn.LayerNorm, .*got .*L"):
            fastattn.replace(Classifier(), only=wrong)
