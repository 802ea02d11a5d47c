"""`sememe serve`: an engine behind HTTP, in the shapes of OpenAI's API (docs/serving.md)."""
