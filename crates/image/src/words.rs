//! Words of recipes: split at blanks, with quotes, `\` and variables.

/// A word as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    text: String,
    /// Quotes in it are themselves, as it comes from JSON.
    plain: bool,
}

impl Word {
    pub(crate) fn new(text: &str) -> Result<Self, String> {
        let word = Self {
            text: text.into(),
            plain: false,
        };
        word.expand(&|_| None)?;
        Ok(word)
    }

    pub(crate) fn plain(text: String) -> Result<Self, String> {
        let word = Self { text, plain: true };
        word.expand(&|_| None)?;
        Ok(word)
    }

    /// As it stands in the recipe.
    #[must_use]
    pub fn as_written(&self) -> &str {
        &self.text
    }

    /// What it says: without quotes, with the variables that `lookup` knows; others are empty.
    ///
    /// # Errors
    /// A quote or brace that does not end, or a form of `${...}` that is not taken.
    pub fn expand(&self, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
        let mut out = String::new();
        let mut rest = self.text.as_str();
        let mut quote = None;
        while let Some(c) = rest.chars().next() {
            let after = &rest[c.len_utf8()..];
            match (c, quote) {
                ('\'' | '"', None) if !self.plain => {
                    quote = Some(c);
                    rest = after;
                }
                (c, Some(open)) if c == open => {
                    quote = None;
                    rest = after;
                }
                ('\\', None | Some('"')) => {
                    let next = after.chars().next();
                    // In double quotes it is itself before most.
                    if quote.is_some() && !matches!(next, Some('"' | '$' | '\\')) {
                        out.push('\\');
                    }
                    out.extend(next);
                    rest = &after[next.map_or(0, char::len_utf8)..];
                }
                ('$', None | Some('"')) => {
                    let (value, after) = variable(after, lookup)?;
                    out.push_str(&value);
                    rest = after;
                }
                (c, _) => {
                    out.push(c);
                    rest = after;
                }
            }
        }
        match quote {
            Some(open) => Err(format!("the quote {open} in {} does not end", self.text)),
            None => Ok(out),
        }
    }
}

/// What stands behind `$`: its value, and what follows.
fn variable<'a>(
    text: &'a str,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<(String, &'a str), String> {
    let of_name = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let end = end.unwrap_or(text.len());
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            0
        } else {
            end
        }
    };
    let Some(inner) = text.strip_prefix('{') else {
        let end = of_name(text);
        if end == 0 {
            return Ok(("$".into(), text));
        }
        return Ok((lookup(&text[..end]).unwrap_or_default(), &text[end..]));
    };
    let end = of_name(inner);
    let name = &inner[..end];
    let wrong = || {
        format!(
            "${{{} is no variable: write ${{NAME}}, ${{NAME:-DEFAULT}} or ${{NAME:+INSTEAD}}",
            inner.split('}').next().unwrap_or_default()
        )
    };
    if name.is_empty() {
        return Err(wrong());
    }
    let value = lookup(name);
    if let Some(after) = inner[end..].strip_prefix('}') {
        return Ok((value.unwrap_or_default(), after));
    }
    let rest = &inner[end..];
    let (strict, operator) = match rest.strip_prefix(':') {
        Some(operator) => (true, operator),
        None => (false, rest),
    };
    let word = operator.get(1..).unwrap_or_default();
    let close = closing(word).ok_or_else(wrong)?;
    let is_set = value
        .as_ref()
        .is_some_and(|value| !strict || !value.is_empty());
    let other = || {
        Word {
            text: word[..close].into(),
            plain: false,
        }
        .expand(lookup)
    };
    let said = match operator.as_bytes().first() {
        Some(b'-') if is_set => value.unwrap_or_default(),
        Some(b'-') => other()?,
        Some(b'+') if is_set => other()?,
        Some(b'+') => String::new(),
        _ => return Err(wrong()),
    };
    Ok((said, &word[close + 1..]))
}

/// Where the brace ends that was opened before.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0u32;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// Splits a line at blanks that are neither quoted nor behind `\`.
pub(crate) fn split(line: &str) -> Result<Vec<&str>, String> {
    let mut found = Vec::new();
    let (mut begin, mut quote, mut escaped) = (None, None, false);
    for (at, c) in line.char_indices() {
        if c.is_whitespace() && quote.is_none() && !escaped {
            if let Some(begin) = begin.take() {
                found.push(&line[begin..at]);
            }
            continue;
        }
        begin.get_or_insert(at);
        match (c, quote) {
            _ if escaped => escaped = false,
            ('\\', None | Some('"')) => escaped = true,
            ('\'' | '"', None) => quote = Some(c),
            (c, Some(open)) if c == open => quote = None,
            _ => {}
        }
    }
    if let Some(open) = quote {
        return Err(format!("a quote {open} does not end: {line}"));
    }
    found.extend(begin.map(|begin| &line[begin..]));
    Ok(found)
}
