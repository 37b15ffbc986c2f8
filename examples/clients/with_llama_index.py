"""LlamaIndex: notes and photos in one in-memory multi-modal index, and binary embeddings of texts.

python examples/clients/with_llama_index.py photos/*.jpg
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from llama_index.core.indices import MultiModalVectorStoreIndex
from llama_index.core.schema import ImageNode, TextNode
from llama_index.embeddings.jinaai import JinaEmbedding

NOTES = ["The rocket lifts off at dawn.", "Ein Rezept für Milchkaffee", "猫は一日の大半を眠って過ごす。"]
CAPTIONS = ["a cup of coffee", "eine Rakete beim Start", "一只猫的照片"]


def main() -> None:
    args = arguments()
    model = embedding(args)
    nodes = [TextNode(text=note) for note in NOTES]
    nodes += [ImageNode(image_path=str(path), metadata={"name": path.name}) for path in args.photos]
    index = MultiModalVectorStoreIndex(nodes=nodes, embed_model=model, image_embed_model=model)
    retriever = index.as_retriever(similarity_top_k=100, image_similarity_top_k=100)
    show("Kaffee mit Milch", [(n.text, n.score or 0.0) for n in retriever.text_retrieve("Kaffee mit Milch")])
    for caption in CAPTIONS:
        found = retriever.text_to_image_retrieve(caption)
        show(caption, [(node.metadata["name"], node.score or 0.0) for node in found])
    bits(embedding(args, encoding_documents="ubinary", encoding_queries="binary"))


def embedding(args: argparse.Namespace, **options: str) -> JinaEmbedding:
    """The embedding model of the server.

    task= and dimensions= are not set. The class sends both with texts, but never sends dimensions with photos.
    """
    model = JinaEmbedding(model=args.model, api_key=args.api_key, **options)
    model._api.api_url = f"{args.url}/embeddings"  # the class ignores base_url=
    return model


def bits(model: JinaEmbedding) -> None:
    """Compare binary embeddings of texts: the score is the fraction of equal bits."""
    query = np.array(model.get_query_embedding("Kaffee mit Milch"))
    notes = np.array(model.get_text_embedding_batch(NOTES))
    show("Kaffee mit Milch, in bits", list(zip(NOTES, (notes == query).mean(1), strict=True)))


def show(query: str, found: list[tuple[str, float]]) -> None:
    print(query)
    for name, cosine in sorted(found, key=lambda pair: -pair[1]):
        print(f"  {cosine:.6f}  {name}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="API URL of jinaclip serve")
    parser.add_argument("--model", default="jina-clip-v2", help="model name that the server accepts")
    parser.add_argument("--api-key", default=os.environ.get("JINA_API_KEY", "none"), help="default: $JINA_API_KEY")
    return parser.parse_args()


if __name__ == "__main__":
    main()
