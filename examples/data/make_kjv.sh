#!/bin/sh
# Rebuild kjv_gospels_and_acts.txt from Debian's packages; usage: sh make_kjv.sh [OUTPUT]
# Needs a Debian bookworm system (apt-get, dpkg) with libreadline8. Nothing is installed.
set -eu
export LC_ALL=C

version=4.38
output=${1:-$(dirname "$0")/kjv_gospels_and_acts.txt}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

(cd "$work" && apt-get download "bible-kjv-text=$version" "bible-kjv=$version")
for package in "$work"/*.deb; do
    dpkg -x "$package" "$work/root"
done

# The text is stored in the tool's own compressed format, so the tool prints it: one verse a line,
# "Mat1:1 The book of ...". A heading for each chapter takes the place of that prefix.
"$work/root/usr/bin/bible" -p "$work/root/usr/lib" -f mt1:1-act28:31 |
    awk '
        BEGIN {
            title["Mat"] = "Matthew"; title["Mark"] = "Mark"; title["Luke"] = "Luke"
            title["John"] = "John"; title["Acts"] = "The Acts"
        }
        {
            split($1, reference, ":")
            book = reference[1]; sub(/[0-9]+$/, "", book)
            chapter = substr(reference[1], length(book) + 1)
            if (!(book in title)) { print "unknown book: " $1 > "/dev/stderr"; exit 1 }
            heading = title[book] " " chapter
            if (heading != last) { print (NR > 1 ? "\n" : "") heading "\n"; last = heading }
            print reference[2] substr($0, length($1) + 1)
        }
    ' > "$work/text"

# 4786 verses, 117 headings, and the blank lines around them; sh has no pipefail to tell of a short read.
[ "$(wc -l < "$work/text")" -eq 5136 ] || { echo "verses are missing" >&2; exit 1; }
mv "$work/text" "$output"
sha256sum "$output"
