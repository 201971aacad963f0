"""Replaced models in the trainers that people use: the losses are those of the unreplaced model."""

import copy
import os

import pytest
import torch
from processes import run_code

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from transformers_families import model_of

import fastattn

TOKENS = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(0))
REAL = (torch.arange(12) < torch.tensor([12, 5, 9, 3, 12, 4, 7, 6])[:, None]).long()
LABELS = TOKENS.masked_fill(REAL == 0, -100)
DATA = [
    {"input_ids": ids, "attention_mask": real, "labels": labels}
    for ids, real, labels in zip(TOKENS, REAL, LABELS, strict=True)
]


REPLACED = {
    "llama": 26,  # norms, feed-forward blocks, rotary, 14 linear layers, attention, output layer, packing
    "gpt_oss": 20,  # norms, rotary, 8 linear layers, the experts of 2 layers, attention, output layer, packing
}


def models(family="llama"):
    """A tiny model with eager attention, and the same replaced, with padded batches packed."""
    model = copy.deepcopy(model_of(family))
    model.set_attn_implementation("eager")
    ours = copy.deepcopy(model)
    report = fastattn.replace(ours, padding_free=True)
    assert len(report.replaced) == REPLACED[family]
    return model, ours


def losses_of_trainer(model, folder, **options):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    settings = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    arguments = transformers.TrainingArguments(
        str(folder), **settings | options, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=DATA)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    return losses


OPTIONS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_hugging_face_trainer(options, tmp_path):
    expected, losses = (losses_of_trainer(model, tmp_path, **OPTIONS[options]) for model in models())
    assert expected[2] != expected[0]
    torch.testing.assert_close(losses, expected, rtol=0.02 if options == "bf16" else 1e-4, atol=0)


def test_accelerate_with_accumulation():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    found = []
    for model in models():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(DATA, batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for _, batch in zip(range(8), [*loader, *loader], strict=True):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    assert found[0][4] < found[0][0]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    found = []
    for model in models():
        module = Module(model)
        trainer = lightning.Trainer(
            max_steps=4, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=2))
        found.append(module.losses)
    assert len(found[0]) == 8
    torch.testing.assert_close(found[1], found[0], rtol=0.02 if "bf16" in precision else 1e-4, atol=0)


def test_lora_in_the_trainer(tmp_path):
    """The low-rank matrices are in every linear layer, and only they are trained."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    found = []
    for model in models():
        torch.manual_seed(0)
        lora = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.0))
        found.append(losses_of_trainer(lora, tmp_path))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


def test_supervised_fine_tuning_of_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    words = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *"abcdefgh"])}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    rows = {"input_ids": [row[real == 1].tolist() for row, real in zip(TOKENS, REAL, strict=True)]}
    # with a fingerprint of ours, as some versions of datasets cannot make theirs
    data = datasets.Dataset(datasets.table.InMemoryTable.from_pydict(rows), fingerprint="tiny")
    found = []
    for model in models():
        arguments = trl.SFTConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=3, logging_steps=1, learning_rate=1e-2,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(found[0]) == 3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


TWO_PROCESSES = """
import os, sys, torch, torch.distributed as dist, fastattn.ops.linear
from test_trainers import LABELS, REAL, TOKENS, models
from torch.distributed.fsdp import fully_shard

fastattn.ops.linear._LEAST = 0  # our product serves layers of these sizes too
order = torch.tensor([0, 2, 5, 7, 4, 1, 3, 6])  # both processes have 29 tokens
parts = order.view(2, 4)
prepared = {family: models(family) for family in sys.argv[2:]}
parent = os.fork()
rank = 0 if parent else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)

def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)

def fsdp2(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)

for family, (plain, model) in prepared.items():
    expected = [plain(input_ids=TOKENS[p], attention_mask=REAL[p], labels=LABELS[p]).loss for p in parts]
    sum(expected).div(2).backward()
    for wrap in (ddp, fsdp2):
        wrapped = wrap(model)
        part = parts[rank]
        loss = wrapped(input_ids=TOKENS[part], attention_mask=REAL[part], labels=LABELS[part]).loss
        loss.backward()
        torch.testing.assert_close(loss, expected[rank])
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(grad, q.grad, atol=1e-5, rtol=1e-3, msg=name)
        model.zero_grad()
        dist.barrier()
        if parent:
            print(family, wrap.__name__)
del wrapped
dist.destroy_process_group()
if parent:
    assert os.waitpid(parent, 0)[1] == 0
    print("both processes agree")
else:
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork")
def test_two_processes(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs gloo")
    printed = run_code(TWO_PROCESSES, str(tmp_path / "store"), *REPLACED, OMP_NUM_THREADS="1").splitlines()
    cases = [f"{family} {strategy}" for family in REPLACED for strategy in ("ddp", "fsdp2")]
    assert printed == [*cases, "both processes agree"]
