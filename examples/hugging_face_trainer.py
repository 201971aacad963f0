"""The Trainer of transformers with a replaced model: nothing else in the script changes.

Needs the packages transformers and accelerate.
"""

import copy
import tempfile

import torch
import transformers
from comparison import check_agreement, read_options

import fastattn


def train(model, rows, steps, folder):
    """(losses of the steps, seconds) of a run with the Trainer."""
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps, learning_rate=1e-3,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    transformers.PrinterCallback.on_log = lambda *args, **options: None
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    result = trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], result.metrics["train_runtime"]


def main(arguments=None):
    """Train a Mistral with sliding windows twice, the second time after one line."""
    options = read_options(__doc__, arguments)
    width, layers, vocab, seqlen = (32, 1, 100, 16) if options.tiny else (256, 2, 8000, 256)
    config = transformers.MistralConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=2 * width, sliding_window=seqlen // 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config)
    rows = torch.randint(3, vocab, (8, seqlen))
    ours = copy.deepcopy(model)
    print(fastattn.replace(ours))  # the one line
    check_agreement(model, ours, lambda model: model(input_ids=rows[:2], labels=rows[:2]).loss)
    with tempfile.TemporaryDirectory() as folder:
        losses, seconds = train(model, rows, options.steps, folder)
        our_losses, our_seconds = train(ours, rows, options.steps, folder)
    print(f"losses before:        {' '.join(f'{loss:.4f}' for loss in losses)}")
    print(f"losses with fastattn: {' '.join(f'{loss:.4f}' for loss in our_losses)}")
    print(f"{seconds:.2f} s before, {our_seconds:.2f} s with fastattn: {seconds / our_seconds:.2f} times as fast")
    torch.testing.assert_close(our_losses, losses, rtol=1e-3, atol=0)
    return seconds / our_seconds


if __name__ == "__main__":
    main()
