"""What leaves the terminal: one document, written as HTML, Markdown or CSV; charts as SVG or PNG."""
