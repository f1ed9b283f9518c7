"""Models and heads that draft, within the steps of the model that they draft for."""
