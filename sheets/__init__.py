"""A sheet on the disk becomes samples: tables, columns, photos, and what is wrong with a row."""
