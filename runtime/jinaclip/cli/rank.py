"""Rank texts for images, or images for texts, by similarity.

--over texts ranks the texts for every image (zero-shot classification). --over images ranks the images for every text
(search). The probabilities are the softmax of the model's logits.
"""

from __future__ import annotations

import argparse
import json

from jinaclip.cli.arguments import add_encoding_arguments, add_model_arguments, find_images, open_model
from jinaclip.embeddings import rankings

EXTRA = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--texts", metavar="TEXT", nargs="+", required=True, help="texts to compare")
    parser.add_argument("--images", metavar="PATH", nargs="+", required=True, help="files, patterns or directories")
    what = "what is ranked; the probabilities of it sum to 1"
    parser.add_argument("--over", choices=("texts", "images"), default="texts", help=what)
    parser.add_argument("--top", type=int, metavar="K", help="show only the K best (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.top is not None and args.top < 1:
        args.usage_error("--top expects a whole number from 1")
    images = find_images(args.images)
    with open_model(args, ("text", "image")) as model:
        both = {"truncate_dim": args.truncate_dim, "show_progress_bar": True}
        of_texts = model.encode_text(args.texts, task=args.task, max_length=args.max_length, **both)
        of_images = model.encode_image(images, resize_mode=args.resize_mode, exif_transpose=args.exif_transpose, **both)
        rows = rankings(model.similarity(of_texts, of_images), model.logit_scale, over=args.over, top=args.top)
    queries, candidates = (images, args.texts) if args.over == "texts" else (args.texts, images)
    for query, row in zip(queries, rows, strict=True):
        results = [{"candidate": candidates[i], "probability": odds, "cosine": cosine} for i, odds, cosine in row]
        if args.json:
            print(json.dumps({"query": query, "results": results}, ensure_ascii=False))
        else:
            print(query)
            for result in results:
                print(f"  {result['probability']:7.2%}  {result['cosine']:+.4f}  {result['candidate']}")
    return 0
