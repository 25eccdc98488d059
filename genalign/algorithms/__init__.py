"""Training methods: recipes, and the credit, losses and schedules that they compose."""
