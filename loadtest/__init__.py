"""Load tests of OpenAI-compatible servers with locust: `argosy loadtest`. Speaks HTTP; knows nothing of the engine."""
