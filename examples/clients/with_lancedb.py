"""LanceDB: use its embedding function for the hosted API with a server. Search notes and photos by text or photo.

python examples/clients/with_lancedb.py photos/*.jpg                      in a temporary directory
python examples/clients/with_lancedb.py photos/*.jpg --directory index/   stored on disk; later runs replace the tables
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import lancedb
import pyarrow as pa
from lancedb.embeddings import EmbeddingFunctionConfig, jinaai, register

NOTES = ["The rocket lifts off at dawn.", "Ein Rezept für Milchkaffee", "猫は一日の大半を眠って過ごす。"]
CAPTIONS = ["a cup of coffee", "eine Rakete beim Start", "一只猫的照片"]


@register("jinaclip")  # type: ignore[no-untyped-call]
class ServedEmbeddings(jinaai.JinaEmbeddings):
    """LanceDB's "jina" function with another URL and the correct embedding size. A table stores both.

    The original class assumes 768 dimensions for every model and always uses the hosted API. It does not send
    `dimensions`, so `size` must be the server's default.
    """

    url: str
    size: int
    max_retries: int = 0  # the default is seven retries with delays, even for rejected requests

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        jinaai.API_URL = f"{self.url}/embeddings"  # a module variable: one server per process

    def ndims(self) -> int:
        return self.size


def main() -> None:
    args = arguments()
    os.environ["JINA_API_KEY"] = args.api_key  # the class rejects a key given as an argument
    facts = httpx.get(f"{args.url}/models", headers={"Authorization": f"Bearer {args.api_key}"}).raise_for_status()
    size = max(facts.json()["data"][0]["dimensions"])
    function = ServedEmbeddings.create(name=args.model, url=args.url, size=size)  # type: ignore[no-untyped-call]
    with TemporaryDirectory() as temporary:
        database = lancedb.connect(args.directory or temporary)
        notes = table(database, "notes", pa.string(), function)
        notes.add([{"name": note, "content": note} for note in NOTES])
        show("Kaffee mit Milch", notes, "Kaffee mit Milch")
        photos = table(database, "photos", pa.binary(), function)
        photos.add([{"name": path.name, "content": path.read_bytes()} for path in args.photos])
        for caption in CAPTIONS:
            show(caption, photos, caption)
        show(f"photos like {args.photos[0].name}", photos, args.photos[0])


def table(database: Any, name: str, kind: pa.DataType, function: ServedEmbeddings) -> Any:
    """Create an empty table of names and contents. LanceDB computes the embedding of each content that is added."""
    vector = pa.list_(pa.float32(), function.ndims())
    schema = pa.schema({"name": pa.string(), "content": kind, "vector": vector})
    embedded = EmbeddingFunctionConfig(source_column="content", vector_column="vector", function=function)
    return database.create_table(name, schema=schema, embedding_functions=[embedded], mode="overwrite")


def show(title: str, found_in: Any, query: str | Path) -> None:
    print(title)
    for row in found_in.search(query).distance_type("cosine").limit(100).to_list():
        print(f"  {1 - row['_distance']:.6f}  {row['name']}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="API URL of jinaclip serve")
    parser.add_argument("--model", default="jina-clip-v2", help="model name that the server accepts")
    parser.add_argument("--api-key", default=os.environ.get("JINA_API_KEY", "none"), help="default: $JINA_API_KEY")
    parser.add_argument("--directory", type=Path, help="directory of the tables (default: temporary)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
