"""Chroma: use its embedding function for the hosted API with a server. Notes and photos are in two collections.

python examples/clients/with_chroma.py photos/*.jpg                      in memory
python examples/clients/with_chroma.py photos/*.jpg --directory index/   stored on disk; later runs add to it
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
from chromadb.config import Settings
from chromadb.utils.embedding_functions import JinaEmbeddingFunction, register_embedding_function
from PIL import Image

NOTES = ["The rocket lifts off at dawn.", "Ein Rezept für Milchkaffee", "猫は一日の大半を眠って過ごす。"]
CAPTIONS = ["a cup of coffee", "eine Rakete beim Start", "一只猫的照片"]


@register_embedding_function
class ServedEmbeddings(JinaEmbeddingFunction):
    """JinaEmbeddingFunction with another URL, registered under its own name so that a collection stores the URL.

    A collection of the original class stores no URL. If it is opened again without embedding_function=, it uses the
    hosted API.
    """

    def __init__(self, url: str, model_name: str) -> None:
        super().__init__(model_name=model_name, api_key_env_var="JINA_API_KEY")
        self._api_url = f"{url}/embeddings"

    @staticmethod
    def name() -> str:
        return "jinaclip"

    def get_config(self) -> dict[str, Any]:
        return {"url": self._api_url.removesuffix("/embeddings"), "model_name": self.model_name}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> ServedEmbeddings:
        return ServedEmbeddings(**config)

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Accepts any fields. The original method rejects "url"."""


def main() -> None:
    args = arguments()
    os.environ["JINA_API_KEY"] = args.api_key  # the class warns about a key given as an argument
    function = ServedEmbeddings(args.url, args.model)
    settings = Settings(anonymized_telemetry=False)
    client = (
        chromadb.PersistentClient(args.directory, settings) if args.directory else chromadb.EphemeralClient(settings)
    )
    notes = client.get_or_create_collection("notes", embedding_function=function)
    notes.upsert(ids=NOTES, documents=NOTES)
    search(notes, "Kaffee mit Milch")
    photos = client.get_or_create_collection("photos", embedding_function=function)
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in args.photos]  # Chroma sends them as PNG
    photos.upsert(ids=[path.name for path in args.photos], images=pixels)
    for caption in CAPTIONS:
        search(photos, caption)


def search(collection: chromadb.Collection, query: str) -> None:
    print(query)
    found = collection.query(query_texts=[query], n_results=100, include=["distances"])
    for name, distance in zip(found["ids"][0], (found["distances"] or [])[0], strict=True):
        print(f"  {1 - distance:.6f}  {name}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="API URL of jinaclip serve")
    parser.add_argument("--model", default="jina-clip-v2", help="model name that the server accepts")
    parser.add_argument("--api-key", default=os.environ.get("JINA_API_KEY", "none"), help="default: $JINA_API_KEY")
    parser.add_argument("--directory", type=Path, help="directory of the index (default: in memory)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
