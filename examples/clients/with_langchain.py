"""LangChain: texts with OpenAIEmbeddings and photos with JinaEmbeddings, each in an in-memory vector store.

python examples/clients/with_langchain.py photos/*.jpg
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from langchain_community.embeddings import JinaEmbeddings, jina
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings

NOTES = ["The rocket lifts off at dawn.", "Ein Rezept für Milchkaffee", "猫は一日の大半を眠って過ごす。"]
CAPTIONS = ["a cup of coffee", "eine Rakete beim Start", "一只猫的照片"]


class PhotoEmbeddings(JinaEmbeddings):
    """Embeds documents as paths of photos and queries as texts, so that a store finds photos by a description."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.embed_images(texts)


def main() -> None:
    args = arguments()
    # Without check_embedding_ctx_length=False it sends token ids of OpenAI's tokenizer, which the server rejects.
    texts = OpenAIEmbeddings(
        base_url=args.url, api_key=args.api_key, model=args.model, check_embedding_ctx_length=False
    )
    notes = InMemoryVectorStore(texts)
    notes.add_texts(NOTES)
    search(notes, "How do I make coffee with milk?")

    jina.JINA_API_URL = f"{args.url}/embeddings"  # a module variable: one server per process
    # The key must be a plain string. The declared type is SecretStr, but for that the class sends asterisks.
    served = PhotoEmbeddings(jina_api_key=args.api_key, model_name=args.model)  # type: ignore[call-arg]
    photos = InMemoryVectorStore(served)
    photos.add_texts([str(path) for path in args.photos])
    for caption in CAPTIONS:
        search(photos, caption)


def search(store: InMemoryVectorStore, query: str) -> None:
    print(query)
    for document, cosine in store.similarity_search_with_score(query, k=100):
        print(f"  {cosine:.6f}  {document.page_content}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="API URL of jinaclip serve")
    parser.add_argument("--model", default="jina-clip-v2", help="model name that the server accepts")
    parser.add_argument("--api-key", default=os.environ.get("JINA_API_KEY", "none"), help="default: $JINA_API_KEY")
    return parser.parse_args()


if __name__ == "__main__":
    main()
