"""OpenAI's client: texts, `dimensions=`, a task, and photos as data: URIs.

python examples/clients/with_openai.py photos/*.jpg --dimensions 256
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
import os
from pathlib import Path
from typing import Any

import numpy as np
from openai import OpenAI, omit

NOTES = ["The rocket lifts off at dawn.", "Ein Rezept für Milchkaffee", "猫は一日の大半を眠って過ごす。"]
QUESTION = "How do I make coffee with milk?"
CAPTIONS = ["a cup of coffee", "eine Rakete beim Start", "一只猫的照片"]


def main() -> None:
    args = arguments()
    client = OpenAI(base_url=args.url, api_key=args.api_key)

    def vectors(items: Any, **fields: Any) -> np.ndarray:
        """Embed texts and {"image": …} objects, which the client sends unchanged.

        Args:
            fields: request fields for which the client has no parameter.
        """
        answer = client.embeddings.create(
            model=args.model, input=items, dimensions=args.dimensions or omit, extra_body=fields
        )
        return np.array([entry.embedding for entry in answer.data])

    question, notes = vectors(QUESTION, task="retrieval.query"), vectors(NOTES)
    show(QUESTION, NOTES, (question @ notes.T)[0])
    photos = vectors([{"image": data_uri(path)} for path in args.photos])
    for caption, cosines in zip(CAPTIONS, vectors(CAPTIONS) @ photos.T, strict=True):
        show(caption, [path.name for path in args.photos], cosines)


def data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def show(query: str, names: list[str], cosines: np.ndarray) -> None:
    print(query)
    for index in np.argsort(-cosines):
        print(f"  {cosines[index]:.6f}  {names[index]}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="API URL of jinaclip serve")
    parser.add_argument("--model", default="jina-clip-v2", help="model name that the server accepts")
    parser.add_argument("--api-key", default=os.environ.get("JINA_API_KEY", "none"), help="default: $JINA_API_KEY")
    parser.add_argument("--dimensions", type=int, help="embedding dimensions (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
