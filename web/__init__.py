"""The page and the API of chat.py --web."""
