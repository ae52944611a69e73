"""Domain packs: a folder of intents, facts and outside examples that a product team writes (docs/domain-packs.md)."""
