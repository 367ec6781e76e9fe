"""From raw text, conversations, comparisons, problems and pictures to token ids."""
