"""The wire: topics, messages, the link to the broker, and the gateway between it and the scheduler.

A query's way in: client.py (socket) → topics.py → messages.py → gateway.py (dedupe.py) → scheduler.
Its answer's way out: scheduler → replies.py (events.py) → client.py.
"""
