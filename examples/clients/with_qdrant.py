"""Qdrant in this process: index photos and notes with their provenance id, and search them by text.

python examples/clients/with_qdrant.py photos/*.jpg                      in memory
python examples/clients/with_qdrant.py photos/*.jpg --directory index/   stored on disk; later runs add to it

Every response of the server has a provenance id (X-Jinaclip-Provenance). The collection stores this id, and the program
rejects embeddings of another checkpoint, preprocessing or precision class. They are not comparable, and searches would
return wrong results without an error.
"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import httpx
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, FieldCondition, Filter, MatchValue, PointStruct, VectorParams

COLLECTION = "jinaclip"
NOTES = ["The rocket lifts off at dawn.", "Ein Rezept für Milchkaffee", "猫は一日の大半を眠って過ごす。"]
CAPTIONS = ["a cup of coffee", "eine Rakete beim Start", "一只猫的照片"]


class Index:
    """A collection of embeddings with the same provenance id.

    Args:
        client: the Qdrant client.
        http: an HTTP client whose base_url is the API URL of the server.
        model: a model name that the server accepts.
    """

    def __init__(self, client: QdrantClient, http: httpx.Client, model: str) -> None:
        self._client, self._http, self._model = client, http, model

    def add(self, kind: str, names: list[str], items: list[dict[str, str]]) -> None:
        """Add items. An item with the same kind and name is replaced."""
        vectors = self._vectors(items)
        ids = [str(uuid5(NAMESPACE_URL, f"{kind}:{name}")) for name in names]
        points = [
            PointStruct(id=point, vector=vector, payload={"kind": kind, "name": name})
            for point, name, vector in zip(ids, names, vectors, strict=True)
        ]
        self._client.upsert(COLLECTION, points)

    def search(self, text: str, kind: str) -> list[tuple[str, float]]:
        """Search items of one kind; photos and texts are not ranked together.

        Returns:
            Names and cosines, best first.
        """
        (vector,) = self._vectors([{"text": text}])
        only = Filter(must=[FieldCondition(key="kind", match=MatchValue(value=kind))])
        found = self._client.query_points(COLLECTION, query=vector, query_filter=only, limit=100).points
        return [(point.payload["name"], point.score) for point in found if point.payload]

    def _vectors(self, items: list[dict[str, str]]) -> list[list[float]]:
        answer = self._http.post("/embeddings", json={"model": self._model, "input": items})
        if answer.is_error:
            raise SystemExit(f"{answer.status_code}: {answer.json()['detail']}")
        vectors = [entry["embedding"] for entry in answer.json()["data"]]
        self._require(answer.headers["x-jinaclip-provenance"], len(vectors[0]))
        return vectors

    def _require(self, provenance: str, size: int) -> None:
        if not self._client.collection_exists(COLLECTION):
            self._client.create_collection(
                COLLECTION,
                vectors_config=VectorParams(size=size, distance=Distance.COSINE),
                metadata={"provenance": provenance},
            )
        stored: dict[str, Any] = self._client.get_collection(COLLECTION).config.metadata or {}
        if stored.get("provenance") != provenance:
            raise SystemExit(
                f"the index has embeddings of {stored.get('provenance')}, the server returns those of {provenance}; "
                "create a new index, or use a server of the first bundle"
            )


def main() -> None:
    args = arguments()
    client = QdrantClient(path=str(args.directory)) if args.directory else QdrantClient(":memory:")
    headers = {"Authorization": f"Bearer {args.api_key}"}
    with httpx.Client(base_url=args.url, headers=headers, timeout=60) as http:
        index = Index(client, http, args.model)
        index.add("note", NOTES, [{"text": note} for note in NOTES])
        pictures = [{"image": base64.b64encode(path.read_bytes()).decode()} for path in args.photos]
        index.add("photo", [path.name for path in args.photos], pictures)
        for caption in CAPTIONS:
            show(caption, index.search(caption, "photo"))
        show("Kaffee mit Milch", index.search("Kaffee mit Milch", "note"))
    client.close()


def show(query: str, found: list[tuple[str, float]]) -> None:
    print(query)
    for name, cosine in found:
        print(f"  {cosine:.6f}  {name}")


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
