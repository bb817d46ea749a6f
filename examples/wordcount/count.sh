#!/bin/sh
# Counts the words of a text: writes all counts to a file, and the ten most frequent words to the log.
set -eu

text=$1
counts=${CORTEX_JOB_DIR:-.}/counts.txt

tr -cs '[:alpha:]' '\n' < "$text" |
    tr '[:upper:]' '[:lower:]' |
    sed '/^$/d' |
    sort |
    uniq -c |
    sort -k1,1nr -k2 > "$counts"

echo "$(wc -l < "$counts") different words in $text; the most frequent:"
sed -n '1,10p' "$counts"
echo "all of them: $counts"
