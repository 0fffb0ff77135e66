"""What the evaluations through a server share: chats, texts to search, servers that are started and stopped."""
