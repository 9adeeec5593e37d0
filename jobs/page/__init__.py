"""report.html: figures drawn as SVG, set in one page that needs nothing else."""
