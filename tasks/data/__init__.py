"""Tasks - data as people have it -> prompts: where rows come from, which shape they have, which of them can be used."""
