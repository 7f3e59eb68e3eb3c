"""A page of HTML as a machine reads it."""

import html.parser


class Page(html.parser.HTMLParser):
    """Collects what the tests ask about, and fails on tags that do not match."""

    VOID = ("meta", "link", "br", "circle", "rect", "path", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.addresses, self.tables, self.cells = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attributes[key] for key in ("id",) if key in attributes]
        self.references += [attributes[key] for key in ("aria-labelledby",) if key in attributes]
        self.addresses += [attributes[key] for key in ("src", "href", "action") if key in attributes]
        if tag == "table":
            self.tables.append([])
        if self.tables and tag in ("caption", "th"):
            self.tables[-1].append((tag, attributes.get("scope")))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag
