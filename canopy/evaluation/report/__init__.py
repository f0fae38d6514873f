"""What `-o DIR` holds: JSON, tables, figures and pages."""
