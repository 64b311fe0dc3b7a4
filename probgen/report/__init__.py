"""What a person sees: tables, and the demo."""
