"""A small SentencePiece model, and dlm.h against it.

Use: python3 pieces.py ENCODE FOLDER make or compare
  make: trains the model and writes it as FOLDER/pieces.json (the tokenizer.json that
  Hugging Face's converter makes of a LLaMA model) and FOLDER/pieces.bin (llama2.c's
  tokenizer.bin); compare: the ids that ENCODE (encode.c) has of both with the model's.
Known and left out: <s> in a text is a token in tokenizer.json and text in SentencePiece;
U+2581 in a text is a space in SentencePiece and a character in llama2.c.
"""
import json
import random
import struct
import subprocess
import sys

import sentencepiece

SPACE = "\u2581"
ALPHABETS = [(0x61, 0x7A), (0x61, 0x7A), (0x41, 0x5A), (0x30, 0x39), (0x21, 0x2F),
             (0xE0, 0xFF), (0x3B1, 0x3C9), (0x430, 0x44F), (0x5D0, 0x5EA),
             (0x4E00, 0x4E40), (0xAC00, 0xAC40), (0x1F600, 0x1F610)]


def word(r, alphabets):
    low, high = r.choice(alphabets)
    # squares favour the first letters, so that there is something to merge
    return "".join(chr(low + int((high - low + 1) * r.random() ** 2))
                   for _ in range(r.randrange(1, 9)))


def train(prefix):
    r = random.Random(1)
    lines = [line.rstrip("\n") for line in open("README.md", encoding="utf-8")]
    lines += [" ".join(word(r, ALPHABETS) for _ in range(12)) for _ in range(3000)]
    with open(prefix + ".txt", "w", encoding="utf-8") as f:
        f.write("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=prefix + ".txt", model_prefix=prefix, model_type="bpe", vocab_size=1200,
        byte_fallback=True, split_digits=True, character_coverage=0.999,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2)


def merges_of(pieces, scores):
    """Every way to make a piece of two, the best score first, then by ids."""
    ids = {p: i for i, p in enumerate(pieces)}
    found = []
    for i, p in enumerate(pieces):
        for k in range(1, len(p)):
            if p[:k] in ids and p[k:] in ids:
                found.append((-scores[i], ids[p[:k]], ids[p[k:]], [p[:k], p[k:]]))
    return [merge[3] for merge in sorted(found)]


def write_json(path, pieces, scores):
    added = [{"id": i, "content": pieces[i], "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False, "special": True} for i in range(3)]
    normalizer = [{"type": "Prepend", "prepend": SPACE},
                  {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoder = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
               {"type": "ByteFallback"}, {"type": "Fuse"},
               {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>",
             "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
             "vocab": {p: i for i, p in enumerate(pieces)},
             "merges": merges_of(pieces, scores)}
    with open(path, "w", encoding="utf-8") as f:
        json.dump({"version": "1.0", "truncation": None, "padding": None,
                   "added_tokens": added,
                   "normalizer": {"type": "Sequence", "normalizers": normalizer},
                   "pre_tokenizer": None, "post_processor": None,
                   "decoder": {"type": "Sequence", "decoders": decoder}, "model": model},
                  f, ensure_ascii=False)


def write_bin(path, pieces, scores):
    named = {1: "\n<s>\n", 2: "\n</s>\n"}
    texts = [named.get(i, p.replace(SPACE, " ")).encode() for i, p in enumerate(pieces)]
    with open(path, "wb") as f:
        f.write(struct.pack("<i", max(len(t) for t in texts)))
        for score, text in zip(scores, texts):
            f.write(struct.pack("<fi", score, len(text)) + text)


def random_text(r):
    strange = ["  ", "\n", "\t", "\u00a0", "<0x41>", "\U0001F680", "e\u0301", "\x7f"]
    parts = [word(r, ALPHABETS) if r.random() < 0.8 else r.choice(strange)
             for _ in range(r.randrange(0, 12))]
    return r.choice(["", " "]).join(parts)


def compare(model, encode, path, texts):
    given = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)
    run = subprocess.run([encode, path], input=given, stdout=subprocess.PIPE)
    if run.returncode != 0:
        return 1
    wrong = 0
    for text, line in zip(texts, run.stdout.decode().split("\n")):
        ids, back = line.split("\t")
        want = model.encode(text)
        same = ids == " ".join(map(str, want))
        if same and bytes.fromhex(back).decode() == model.decode(want):
            continue
        wrong += 1
        if wrong < 5:
            print(f"  {text!r}\n    ours  {ids}\n    ref.  {want}")
    print(f"{'FAIL ' if wrong else ''}SentencePiece and {path}: {len(texts)} texts, "
          f"{wrong} with other ids or decoded otherwise")
    return wrong


def main():
    encode, folder, what = sys.argv[1:]
    if what == "make":
        train(folder + "/pieces")
    model = sentencepiece.SentencePieceProcessor(model_file=folder + "/pieces.model")
    if what == "make":
        pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        scores = [model.get_score(i) for i in range(model.get_piece_size())]
        write_json(folder + "/pieces.json", pieces, scores)
        write_bin(folder + "/pieces.bin", pieces, scores)
        return 0
    r = random.Random(2)
    texts = [random_text(r) for _ in range(5000)]
    return min(1, sum(compare(model, encode, f"{folder}/pieces.{form}", texts)
                      for form in ("json", "bin")))


sys.exit(main())
