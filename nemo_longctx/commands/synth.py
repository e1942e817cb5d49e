"""`nemo-longctx synth`: training documents that can only be predicted by looking back, as JSONL that `prepare` takes."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.files import read_mapping

EPILOG = """\
examples:
  nemo-longctx synth books.jsonl.zst --output data/retrieval.jsonl --tokenizer /ckpt/llama2_7b_hf --length 32768 --tokens 100M
  nemo-longctx prepare data/retrieval.jsonl --output data/retrieval --tokenizer /ckpt/llama2_7b_hf
  ... 'data.mix.sources=[{path: data/long, weight: 0.97}, {path: data/retrieval, weight: 0.03}]'

Each document has exactly LENGTH tokens, its end included: with data.packing=best_fit it fills a window of that length. Numbers
and names are none that the probes of `nemo-longctx eval` ask for. OUTPUT.made says what was made, in which shares.
"""
BEFORE = "."  # stands before a piece to see what it is there
TEXT = 64 * 2**20  # characters of input kept to hide things in


def configure(parser: argparse.ArgumentParser) -> None:
    from nemo_longctx.commands.prepare import names, size
    from nemo_longctx.data.retrieval_text import KINDS, USUAL

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text as prepare takes it: files or directories")
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="documents, one {text, kind, facts} a line")
    parser.add_argument("--tokenizer", required=True, metavar="NAME_OR_DIR", help="the tokenizer that lengths are counted in")
    parser.add_argument(
        "--length", type=size, required=True, help="tokens of each document, the end-of-document token included"
    )
    parser.add_argument("--tokens", type=size, required=True, metavar="SIZE", help="tokens of all documents: 100M, 4Mi")
    parser.add_argument(
        "--kinds",
        default="",
        help=f"kind=share by comma, e.g. passkey=0.5,records=0.5, of {', '.join(KINDS)} (default: equal shares of the first "
        f"{len(USUAL)})",
    )
    parser.add_argument("--facts", type=int, help="most facts of a document of records or codes (default: 3)")
    parser.add_argument(
        "--filler", type=float, help="how much ordinary text lies between the facts of records or rounds, 0 to 1 (default: 0.5)"
    )
    parser.add_argument("--keys", type=names, help="texts of a record, joined (default: text)")
    parser.add_argument("--glob", dest="globs", action="append", default=[], help="which files of directories; may be repeated")
    parser.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True, help="prepare will add it (default: yes)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of everything drawn (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a file that other settings made")


def run(args: argparse.Namespace) -> int:
    from nemo_longctx.bars import ProgressBar
    from nemo_longctx.data.retrieval_text import Maker, RetrievalConfig, report
    from nemo_longctx.data.tokenization import load_tokenizer
    from nemo_longctx.files import write_text, written_atomically

    config = RetrievalConfig(
        length=args.length, tokens=args.tokens, shares=_shares(args.kinds), facts=args.facts, filler=args.filler, seed=args.seed
    )
    output = Path(args.output)
    if output.suffix != ".jsonl":
        raise ConfigError("--output", args.output, "name a file that ends in .jsonl, which prepare reads")
    _keep_others(args.inputs, output)
    tokenizer = load_tokenizer(args.tokenizer)
    ends = 1 if args.append_eod and tokenizer.eod_id is not None else 0
    settings: dict[str, Any] = {"inputs": args.inputs, "tokenizer": args.tokenizer, "tokenizer_sha256": tokenizer.sha256}
    settings |= {"seed": args.seed, "facts": config.facts, "filler": config.filler, "appended_end_tokens": ends}
    settings["asked"] = {"length": args.length, "tokens": args.tokens, "kinds": dict(config.shares)}
    args.keys = args.keys or ("text",)
    settings["asked"] |= {"keys": ",".join(args.keys), "glob": args.globs}
    if not args.force:
        _keep_made(output, settings)
    texts = _texts(args, os.path.abspath(output))
    from tokenizers import Tokenizer

    engine = Tokenizer.from_str(tokenizer.definition)
    engine.encode_special_tokens = True
    engine.no_truncation()

    def encode(text: str) -> list[int]:
        try:
            return engine.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the Rust side raises no narrower type
            why = f"it cannot encode the text ({(str(error).splitlines() or [''])[0]}); take one that knows every letter of it"
            raise ConfigError("tokenizer", args.tokenizer, why) from error

    pieces = _pieces(engine, encode) if {"rounds", "repeats"} & set(config.shares) else []
    maker = Maker(config, texts, encode, ends=ends, pieces=pieces)
    output.parent.mkdir(parents=True, exist_ok=True)
    made: dict[str, int] = {}
    bar = ProgressBar(total=config.documents, desc="retrieval text", unit="doc")
    before, digest = _contents(output), hashlib.sha256()
    with written_atomically(output) as file, bar:
        for number, kind in enumerate(config.kinds()):
            document = maker.make(number, kind)
            line = {"text": document.text, "kind": document.kind, "facts": document.facts}
            written = (json.dumps(line, ensure_ascii=False) + "\n").encode()
            file.write(written)
            digest.update(written)
            made[document.kind] = made.get(document.kind, 0) + 1
            bar.update()
        found: dict[str, Any] = report(config, made)
        output.unlink(missing_ok=True)  # a kill from here on leaves no text beside another's note
        write_text(_note(output), json.dumps(found | settings, indent=1) + "\n")
    if before is not None and before[0] == digest.digest():  # the file that a corpus was prepared from, to the second
        os.utime(output, ns=before[1])
    print(f"{args.output}: {found['documents']:,} documents of {config.length:,} tokens, {found['tokens']:,} in all")
    for kind, values in found["kinds"].items():
        print(f"  {kind:<15}{values['documents']:>9,} documents{values['tokens']:>15,} tokens{values['share']:>8.1%}")
    return 0


def _pieces(engine: Any, encode: Callable[[str], list[int]]) -> list[str]:
    """Texts that are one token each, also one behind another, and can be printed."""
    model = json.loads(engine.to_str())["model"]
    unknown = model.get("unk_token") or (model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None)
    tokens = range(engine.get_vocab_size())
    alone = dict(zip(engine.decode_batch([[token] for token in tokens]), tokens, strict=True))
    kept = {text: token for text, token in alone.items() if _printable(text) and text != unknown and len(encode(text)) == 1}
    if engine.decode(list(kept.values())) == "".join(kept):
        return list(kept)
    # SentencePiece and WordPiece write a token's space only behind another one; in a row without spaces all were one word.
    begin = encode(BEFORE)
    behind = [text[len(BEFORE) :] for text in engine.decode_batch([[*begin, token] for token in tokens])]
    known = [text for text in dict.fromkeys(behind) if _printable(text) and text != unknown]
    return [text for text in known if len(encode(BEFORE + text)) == len(begin) + 1]


def _printable(text: str) -> bool:
    return bool(text) and text.isprintable() and "\ufffd" not in text


def _contents(path: Path) -> tuple[bytes, tuple[int, int]] | None:
    """Digest and times of a file; None where none is."""
    if not path.exists():
        return None
    times = path.stat()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest(), (times.st_atime_ns, times.st_mtime_ns)


def _note(output: Path) -> Path:
    return output.with_name(output.name + ".made")


def _keep_others(inputs: list[str], output: Path) -> None:
    """Refuse to write over text that this command did not make: what is read, or a file without its note."""
    if any(os.path.realpath(each) == os.path.realpath(output) for each in inputs):
        raise ConfigError("--output", str(output), "is one of the inputs and would be replaced; name another file")
    if output.exists() and not _note(output).exists():
        raise ConfigError("--output", str(output), "something else is there; name another file, or remove it")


def _keep_made(output: Path, settings: dict[str, Any]) -> None:
    """Refuse to write over what other settings made, by their names."""
    if not output.exists():
        return
    before = read_mapping(_note(output))
    if not before:
        raise ConfigError(
            "--output", str(output), f"{_note(output)} is no note of what made it; name another file, or use --force"
        )
    before |= before.get("asked", {})
    if other := [key for key, value in (settings | settings["asked"]).items() if key != "asked" and before.get(key) != value]:
        mend = f"was made with another {' and another '.join(other)}; name another file, or replace it with --force"
        raise ConfigError("--output", str(output), mend)


def _shares(text: str) -> dict[str, float]:
    """`passkey=0.5,records=0.5` -> shares; names alone share equally."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    shares: dict[str, float] = {}
    for part in parts:
        kind, equals, share = part.partition("=")
        try:
            shares[kind] = float(share) if equals else 1 / len(parts)
        except ValueError:
            raise ConfigError("--kinds", text, f"{share!r} is no share; write kind=share, by comma") from None
    return shares


def _texts(args: argparse.Namespace, output: str) -> list[str]:
    """Documents of the inputs, in their order, up to `TEXT` characters; bad records and what `synth` made are passed over."""
    from nemo_longctx.bars import say
    from nemo_longctx.data.inputs import check_globs, find_files, format_of, shown
    from nemo_longctx.data.long_text import pieces_of
    from nemo_longctx.data.readers import read_part, split_file

    check_globs(args.inputs, args.globs)
    made = _made_in(args.inputs).difference({output})
    if made:
        say(f"not read, since synth made them: {shown(min(made))}{f' and {len(made) - 1:,} more' if len(made) > 1 else ''}")
    found = find_files(args.inputs, args.globs, exclude={output, *made})
    if found.passed_over or len(found.files) > 1:
        say(found.summary())
    texts: list[str] = []
    have = bad = 0
    for path in found.files:
        for part in split_file(path, format_of(path), 1 << 30):
            for record in read_part(part, args.keys):
                text = "".join(pieces_of(record.text))
                bad += bool(record.error)
                if not record.error and text.strip():
                    texts.append(text)
                    have += len(text)
                if have >= TEXT:
                    say(f"the first {have:,} characters of the input are enough, up to {shown(path)}")
                    return texts
    if bad and texts:
        say(f"{bad:,} records without a text of --keys {','.join(args.keys)} are left out")
    if not texts:
        raise ConfigError("inputs", args.inputs, "no text was read from them; are the files and --keys right?")
    return texts


def _made_in(inputs: list[str]) -> set[str]:
    """What earlier runs of this command wrote into folders that are read: nothing is hidden in retrieval text."""
    folders = [root for each in inputs if os.path.isdir(each) for root, *_ in os.walk(each, followlinks=False)]
    notes = [path for folder in folders for path in Path(folder).glob("*.jsonl.made")]
    return {os.path.abspath(path.with_suffix("")) for path in notes}
