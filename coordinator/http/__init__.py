"""The HTTP API: OpenAI's shapes, and what operators look at."""
