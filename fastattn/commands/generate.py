"""fastattn generate: continues or translates a text with a trained model."""

import itertools

from fastattn.training.data.tokenizer import count_unknown, end_tokens
from fastattn.training.inspect.generate import beam_search, check_sampling, stream_text, stream_tokens
from fastattn.training.messages import UsageError, expect, warn
from fastattn.training.runs.load import load_run, load_task

from ._options import add_input, open_run, print_json, read_input, run_parser

DRAWING = {  # defaults of the options that only task lm has
    "max_new_tokens": 300, "temperature": 0.8, "top_k": None, "top_p": None, "repetition_penalty": 1.0, "stop": None,
    "seed": 0, "weights": None,
}  # fmt: skip
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def parser():
    parser = run_parser("generate", "Continue a prompt, or translate it, with a trained model.")
    parser.add_argument("--prompt", type=str | None, help="text to continue")
    add_input(parser, "continue, as JSON lines,")
    parser.add_argument("--max_new_tokens", type=int, help="tokens to add")
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token")
    parser.add_argument("--top_k", type=int | None, help="draw from the k most likely tokens only")
    parser.add_argument(
        "--top_p", type=float | None, help="draw from the most likely tokens that together reach this probability"
    )
    parser.add_argument("--repetition_penalty", type=float, help="above 1: avoid tokens that are already in the text")
    parser.add_argument(
        "--beams", type=int, default=1, help="above 1: take the most likely text of a beam search instead of drawing"
    )
    parser.add_argument("--stop", type=str | None, help="stop before this text")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument(
        "--samples", type=int, default=1, help="above 1: this many texts for each prompt, as JSON lines"
    )
    parser.add_argument(
        "--weights", type=str | None,
        help="bf16 or int8: read the weights in this dtype, which is faster and rounds them; only on a CPU",
    )  # fmt: skip
    parser.set_defaults(DRAWING)
    return parser


def run(options, _argv):
    if (options.prompt is None) == (options.input is None):
        raise UsageError("generate needs either --prompt TEXT or --input FILE")
    run, config, how = open_run(options)
    if config.task not in ("lm", "translate", "chat", "preference"):
        known = "lm, translate, chat or preference"
        raise UsageError(f"run {str(run)!r}: generate needs a run of task {known}, got {config.task}")
    expect(options.stop != "", "stop", "at least one character long", options.stop)
    if config.task != "lm":
        expect(options.prompt != "", "prompt", "at least one character long", options.prompt)
    numbers = ("beams", "seed", "weights", *SAMPLING)
    check_sampling(options.max_new_tokens, **{name: options[name] for name in numbers})
    expect(options.samples >= 1, "samples", "at least 1", options.samples)
    expect(options.seed + options.samples <= 2**63, "seed + samples", "at most 2**63", options.seed + options.samples)
    one_text = config.task == "translate" or options.beams > 1 or options.temperature == 0
    expect(options.samples == 1 or not one_text, "samples", "1 where nothing is drawn", options.samples)
    if options.beams > 1:  # a search draws nothing
        for name in (*SAMPLING, "seed"):
            if options[name] != DRAWING[name]:
                raise UsageError(f"{name} cannot be used with beams, got {options[name]!r}")
    if config.task == "translate":
        translate(options, run, config, how)
    elif config.task in ("chat", "preference"):
        answer_questions(options, run, config, how)
    else:
        continue_prompt(options, run, config, how)


def translate(options, run, config, how):
    for name, default in DRAWING.items():
        if options[name] != default:
            raise UsageError(f"{name} is for task lm only, but the task of this run is translate")
    model, task = load_task(run, config, **how)
    if options.input is None:
        print(*task.translate(model, [options.prompt], beams=options.beams))
        return
    texts = read_input(options).texts
    for text, translation in zip(texts, task.translate(model, texts, beams=options.beams), strict=True):
        print_json({"text": text, "translation": translation})


def answer_questions(options, run, config, how):
    for name in ("beams", "stop", "weights"):
        default = DRAWING.get(name, 1)
        if options[name] != default:
            raise UsageError(
                f"{name} is not for task {config.task}, which is the task of this run, got {options[name]!r}"
            )
    model, task = load_task(run, config, **how)
    sampling = {name: options[name] for name in (*SAMPLING, "max_new_tokens")}
    for question in [options.prompt] if options.input is None else read_input(options).texts:
        for seed, number in samples(options):
            answer = task.answer(model, [("user", question)], seed=seed, **sampling)
            print_json({"prompt": question, **number, "answer": answer}) if as_json(options) else print(answer)


def continue_prompt(options, run, config, how):
    prompts = [options.prompt] if options.input is None else read_input(options).texts
    model, tokenizer, _ = load_run(run, config, **how)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]  # an error shows before anything is printed
    if options.input is not None and not all(encoded):
        raise UsageError(f"input: text {encoded.index([]) + 1} must have at least one token, got an empty text")
    for prompt, numbers in zip(prompts, encoded, strict=True):
        if as_json(options):
            for seed, number in samples(options):
                pieces = continuation(options, model, tokenizer, prompt, numbers, seed)
                print_json({"prompt": prompt, **number, "text": prompt + "".join(pieces)})
            continue
        pieces = continuation(options, model, tokenizer, prompt, numbers, options.seed)
        pieces = itertools.chain([*itertools.islice(pieces, 1)], pieces)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def as_json(options):
    return options.input is not None or options.samples > 1


def samples(options):
    """(seed, {"sample": number} if there are several) of each text for a prompt."""
    for number in range(options.samples):
        yield options.seed + number, {"sample": number} if options.samples > 1 else {}


def continuation(options, model, tokenizer, text, prompt, seed):
    """The pieces of text that the model adds to a prompt, given as text and as token numbers."""
    stop = end_tokens(tokenizer)
    if unknown := count_unknown(tokenizer, prompt):
        warn(f"the vocabulary does not know {unknown} of the {len(prompt)} tokens of the prompt")
    if options.beams > 1:
        numbers = beam_search(
            model, prompt, options.max_new_tokens, beams=options.beams, stop=stop, weights=options.weights
        )
    else:
        sampling = {name: options[name] for name in (*SAMPLING, "weights")}
        numbers = stream_tokens(model, prompt, options.max_new_tokens, stop=stop, seed=seed, **sampling)
    return stream_text(tokenizer, numbers, options.stop, prompt=prompt, typed=text)
