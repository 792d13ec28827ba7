//! Owns the guess which known word a misspelt one stands for.

/// Characters of a word that are looked at; no known word is longer.
const WORD_CHARS_MAX: usize = 32;

/// The known word that differs least from `given`, case aside, if that is little enough to be a slip.
pub(crate) fn nearest<'w>(given: &str, known: impl IntoIterator<Item = &'w str>) -> Option<&'w str> {
    let given = letters(given)?;
    let slips_max = match given.len() {
        0..=2 => 0,
        3..=5 => 1,
        _ => 2,
    };
    let ranked = known.into_iter().filter_map(|word| Some((slips(&given, &letters(word)?), word)));
    ranked.filter(|(slips, _)| *slips <= slips_max).min_by_key(|(slips, _)| *slips).map(|(_, word)| word)
}

fn letters(word: &str) -> Option<Vec<char>> {
    let letters: Vec<char> =
        word.chars().map(|letter| letter.to_ascii_lowercase()).take(WORD_CHARS_MAX + 1).collect();
    (letters.len() <= WORD_CHARS_MAX).then_some(letters)
}

/// Letters left out, added, changed or exchanged with their neighbour (optimal string alignment).
fn slips(given: &[char], known: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=known.len()).collect();
    for (row, letter) in given.iter().enumerate() {
        let mut next = vec![row + 1];
        for (column, other) in known.iter().enumerate() {
            let mut least =
                (last[column] + usize::from(letter != other)).min(last[column + 1] + 1).min(next[column] + 1);
            if row > 0 && column > 0 && given[row - 1] == *other && known[column - 1] == *letter {
                least = least.min(before[column - 1] + 1);
            }
            next.push(least);
        }
        before = std::mem::replace(&mut last, next);
    }
    last[known.len()]
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn slips_are_forgiven_and_other_words_are_not() {
        let known = ["from", "where", "into", "starts_with", "$upstream"];
        for (given, expected) in [
            ("FORM", Some("from")),
            ("were", Some("where")),
            ("INOT", Some("into")),
            ("startswith", Some("starts_with")),
            ("$upstreem", Some("$upstream")),
            ("in", None),
            ("frequency", None),
            ("", None),
        ] {
            assert_eq!(nearest(given, known), expected, "{given}");
        }
        assert_eq!(nearest(&"x".repeat(70_000), known), None);
    }
}
