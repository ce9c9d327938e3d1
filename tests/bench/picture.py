"""Draws what the agents cost side by side, as SVG, in colours for white and for black pages."""

from xml.sax.saxutils import escape

PANELS = [  # a title, what is shown, and its format
    ('start of systemd → Ready, s', 'ready', '%.2f'),
    ('extra CPU of the boot, ms', 'extra_cpu', '%.0f'),
    ('largest process, MiB', 'memory', '%.1f'),
]
LABELS, PANEL, BAR, LINE, HEAD = 110, 230, 150, 15, 52  # pixels
GAP = 12  # between two agents
TEXT, OURS, OTHERS = '#768390', '#3b82f6', '#d97706'
FADED = 0.6  # opacity of the bars of the second release


def draw(results, subjects):
    """The picture of the medians of subjects, from the results by the name of the release."""
    width = LABELS + PANEL * len(PANELS)
    step = LINE * len(results) + GAP
    height = HEAD + step * len(subjects) + LINE
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d"'
        ' font-family="sans-serif" font-size="12" fill="%s" role="img">'
        % (width, height, width, height, TEXT),
        '<title>What a first boot costs with each agent</title>',
    ]
    for row, subject in enumerate(subjects):
        parts.append(text(0, HEAD + step * row + LINE, subject, 'font-size="14"'))
    for column, (title, key, form) in enumerate(PANELS):
        left = LABELS + PANEL * column
        parts.append(text(left, 16, title, 'font-weight="bold"'))
        values = {
            (row, turn): found.median(subject, key)
            for row, subject in enumerate(subjects)
            for turn, found in enumerate(results.values())
        }
        most = max(values.values())
        for (row, turn), value in values.items():
            top = HEAD + step * row + LINE * turn
            color = OURS if subjects[row].startswith('.') else OTHERS
            parts.append(bar(left, top, BAR * value / most, color, FADED if turn else 1))
            parts.append(text(left + BAR * value / most + 5, top + LINE - 4, form % value))
    for turn, release in enumerate(results):
        left = LABELS + PANEL * turn // 2
        parts.append(bar(left, 26, 20, TEXT, FADED if turn else 1))
        parts.append(text(left + 26, 37, release))
    return '\n'.join(parts) + '\n</svg>\n'


def text(left, base, words, more=''):
    return '<text x="%.0f" y="%.0f" %s>%s</text>' % (left, base, more, escape(words))


def bar(left, top, width, color, opacity):
    return '<rect x="%.0f" y="%.0f" width="%.1f" height="%d" rx="2" fill="%s" opacity="%s"/>' % (
        left,
        top,
        max(width, 1),
        LINE - 3,
        color,
        opacity,
    )
