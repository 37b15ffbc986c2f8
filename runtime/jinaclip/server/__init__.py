"""`jinaclip serve`: the hosted embeddings API, answered by a bundle."""
