//! Reads JSON objects field by field, keeps the place of each, and goes on after a mistake.
//!
//! serde's derived readers stop at the first mistake. Here serde_json cuts the text into raw values that
//! still point into it; a field that cannot be read leaves a [`Problem`] and a stand-in value, which
//! nobody sees, since a document with a problem is refused as a whole.
//!
//! Deliberately does not know: which fields there are.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::{ConfigError, Problem, Problems};
use crate::{MAX_PROBLEMS, MAX_SIZE_BYTES};

/// Characters of an offending value or name that a message shows.
const SHOWN_CHARS: usize = 40;

/// Refuses what is too long to be read.
pub(crate) fn check_size(size_bytes: usize, file: &str) -> Result<(), ConfigError> {
    if size_bytes > MAX_SIZE_BYTES {
        return Err(ConfigError::TooLong {
            file: file.to_owned(),
            size_bytes,
            limit_bytes: MAX_SIZE_BYTES,
        });
    }
    Ok(())
}

/// Line and column, from 1, of what follows `text`.
pub(crate) fn position_after(text: &str) -> (usize, usize) {
    let line = text.bytes().filter(|b| *b == b'\n').count() + 1;
    let last = text.rsplit('\n').next().unwrap_or_default();
    (line, last.chars().count() + 1)
}

/// Reads the object that `text` is.
pub(crate) fn read_document<T>(
    text: &str,
    file: &str,
    read: impl FnOnce(&mut Object<'_>) -> T,
) -> Result<T, ConfigError> {
    check_size(text.len(), file)?;
    if text.trim().is_empty() {
        return Err(ConfigError::Empty {
            file: file.to_owned(),
        });
    }
    // Checks the syntax to the end, without recursion; what is cut out of it below is JSON for sure.
    let whole: &RawValue = serde_json::from_str(text).map_err(|e| not_json(&e, text, file))?;
    let report = Report {
        text,
        listed: RefCell::default(),
        unlisted: RefCell::default(),
    };
    let whole = Value {
        raw: whole.get(),
        field: String::new(),
        report: &report,
    };
    let value = whole.object().map(|mut object| {
        let value = read(&mut object);
        object.refuse_the_rest();
        value
    });
    let mut listed = report.listed.into_inner();
    match value {
        Some(value) if listed.is_empty() => Ok(value),
        _ => {
            listed.sort_by_key(|p| (p.line, p.column));
            Err(ConfigError::Wrong(Problems {
                file: file.to_owned(),
                listed,
                unlisted: report.unlisted.into_inner(),
            }))
        }
    }
}

fn not_json(error: &serde_json::Error, text: &str, file: &str) -> ConfigError {
    let (line, column) = (error.line(), error.column());
    let before: usize = text
        .split_inclusive('\n')
        .take(line.saturating_sub(1))
        .map(str::len)
        .sum();
    let (before, bad) = text
        .split_at_checked((before + column).saturating_sub(1))
        .unwrap_or_default();
    let what = if bad.starts_with(['}', ']']) && before.trim_end().ends_with(',') {
        // The most frequent mistake, which serde_json calls a missing key or value.
        "trailing comma".to_owned()
    } else {
        let what = error.to_string();
        let place = format!(" at line {line} column {column}");
        what.strip_suffix(&place).unwrap_or(&what).to_owned()
    };
    ConfigError::NotJson {
        file: file.to_owned(),
        line,
        column,
        what,
    }
}

/// The problems found so far.
struct Report<'a> {
    text: &'a str,
    listed: RefCell<Vec<Problem>>,
    unlisted: RefCell<usize>,
}

impl Report<'_> {
    /// Notes a problem of `field` at `part`, which is a part of the text. The message is only made if it
    /// will be listed: a hostile file has a hundred thousand of them.
    fn note(&self, part: &str, field: &str, what: impl FnOnce() -> String) {
        let mut listed = self.listed.borrow_mut();
        if listed.len() >= MAX_PROBLEMS {
            *self.unlisted.borrow_mut() += 1;
            return;
        }
        let (line, column) = self.position_of(part);
        listed.push(Problem {
            line,
            column,
            field: field.to_owned(),
            what: what(),
        });
    }

    fn position_of(&self, part: &str) -> (usize, usize) {
        let offset = (part.as_ptr().addr()).saturating_sub(self.text.as_ptr().addr());
        position_after(self.text.get(..offset).unwrap_or_default())
    }
}

/// A value with its place in the text and the name of its field.
pub(crate) struct Value<'a> {
    raw: &'a str,
    field: String,
    report: &'a Report<'a>,
}

impl<'a> Value<'a> {
    /// Notes that this value is wrong.
    pub(crate) fn wrong(&self, what: impl fmt::Display) {
        self.report.note(self.raw, &self.field, || what.to_string());
    }

    /// Whether it is `null` or `[]`. An empty object is something: `"entropy": {}` asks for a device.
    fn is_nothing(&self) -> bool {
        let mut bare = self.raw.chars().filter(|c| !c.is_whitespace());
        self.is_null() || bare.by_ref().take(2).eq("[]".chars())
    }

    pub(crate) fn is_null(&self) -> bool {
        self.raw == "null"
    }

    pub(crate) fn is_string(&self) -> bool {
        self.raw.starts_with('"')
    }

    /// The value as a message shows it.
    pub(crate) fn shown(&self) -> String {
        let kind = match self.raw.bytes().next() {
            Some(b'"') => "the string ",
            Some(b'[') => return "an array".to_owned(),
            Some(b'{') => return "an object".to_owned(),
            Some(b'-' | b'0'..=b'9') => "the number ",
            _ => "",
        };
        format!("{kind}{}", cut(self.raw))
    }

    /// The value as a `T`; notes a problem if it is none.
    pub(crate) fn read<T: Leaf>(&self) -> Option<T> {
        let value = T::from_json(self.raw);
        if value.is_none() {
            self.wrong(format_args!(
                "expected {}, found {}",
                T::EXPECTED,
                self.shown()
            ));
        }
        value
    }

    /// The values of an array, named by their place; notes a problem if it is none.
    fn array(&self) -> Option<Vec<Value<'a>>> {
        let Ok(entries) = serde_json::from_str::<Vec<&'a RawValue>>(self.raw) else {
            self.wrong(format_args!("expected an array, found {}", self.shown()));
            return None;
        };
        let entries = entries.into_iter().enumerate();
        Some(
            entries
                .map(|(at, raw)| Value {
                    raw: raw.get(),
                    field: format!("{}[{at}]", self.field),
                    report: self.report,
                })
                .collect(),
        )
    }

    /// The value as an object whose fields `read` knows; notes a problem if it is none.
    pub(crate) fn section<T>(&self, read: impl FnOnce(&mut Object<'a>) -> T) -> Option<T> {
        let mut object = self.object()?;
        let value = read(&mut object);
        object.refuse_the_rest();
        Some(value)
    }

    /// The value as an object; notes a problem if it is none.
    pub(crate) fn object(&self) -> Option<Object<'a>> {
        if !self.raw.starts_with('{') {
            self.wrong(format_args!("expected an object, found {}", self.shown()));
            return None;
        }
        let Ok(Entries(entries)) = serde_json::from_str::<Entries<'a>>(self.raw) else {
            self.wrong("this object cannot be read");
            return None;
        };
        let mut fields: BTreeMap<String, Field<'a>> = BTreeMap::new();
        for (key, value) in entries {
            let (key, raw) = (key.get(), value.get());
            let Ok(name) = serde_json::from_str::<String>(key) else {
                let what = || format!("the name of a field is no text: {}", cut(key));
                self.report.note(key, &self.field, what);
                continue;
            };
            if let Some(first) = fields.get(&name) {
                self.report.note(key, &joined(&self.field, &name), || {
                    let (line, _) = self.report.position_of(first.key);
                    format!("given twice, first in line {line}; remove one")
                });
                continue;
            }
            fields.insert(name, Field { key, raw });
        }
        Some(Object {
            raw: self.raw,
            field: self.field.clone(),
            fields,
            known: Vec::new(),
            report: self.report,
        })
    }
}

struct Field<'a> {
    key: &'a str,
    raw: &'a str,
}

/// An object that is being read. Each field that is asked for becomes a known one; what is left at the
/// end is unknown.
pub(crate) struct Object<'a> {
    raw: &'a str,
    field: String,
    fields: BTreeMap<String, Field<'a>>,
    known: Vec<&'static str>,
    report: &'a Report<'a>,
}

impl<'a> Object<'a> {
    /// The field `name`, if it is there.
    pub(crate) fn take(&mut self, name: &'static str) -> Option<Value<'a>> {
        self.known.push(name);
        let field = self.fields.remove(name)?;
        Some(Value {
            raw: field.raw,
            field: joined(&self.field, name),
            report: self.report,
        })
    }

    /// A field that may be absent or `null`.
    pub(crate) fn optional<T: Leaf>(&mut self, name: &'static str) -> Option<T> {
        self.take(name).filter(|v| !v.is_null())?.read()
    }

    /// A field that must be there.
    pub(crate) fn required<T: Leaf + Default>(&mut self, name: &'static str) -> T {
        let value = self.required_value(name);
        value.and_then(|v| v.read()).unwrap_or_default()
    }

    /// A field that must be there, as it stands.
    pub(crate) fn required_value(&mut self, name: &'static str) -> Option<Value<'a>> {
        let value = self.take(name);
        if value.is_none() {
            self.missing(name);
        }
        value
    }

    fn missing(&self, name: &str) {
        let what = || "this field is required and missing; add it".to_owned();
        self.report.note(self.raw, &joined(&self.field, name), what);
    }

    /// A field that is an object, read by `read`; absent and `null` are the same.
    pub(crate) fn section<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&mut Object<'a>) -> T,
    ) -> Option<T> {
        self.take(name).filter(|v| !v.is_null())?.section(read)
    }

    /// A field that is an array of objects, each read by `read`; absent and `null` are an empty one.
    pub(crate) fn list<T>(
        &mut self,
        name: &'static str,
        mut read: impl FnMut(&mut Object<'a>) -> T,
    ) -> Vec<T> {
        self.entries(name, |entry| entry.section(&mut read))
    }

    /// As [`Self::list`], of a field that must be there.
    pub(crate) fn required_list<T>(
        &mut self,
        name: &'static str,
        read: impl FnMut(&mut Object<'a>) -> T,
    ) -> Vec<T> {
        if self.is_absent(name) {
            self.missing(name);
        }
        self.list(name, read)
    }

    /// A field that is an array, each entry read by `read`; absent and `null` are an empty one.
    pub(crate) fn entries<T>(
        &mut self,
        name: &'static str,
        mut read: impl FnMut(&Value<'a>) -> Option<T>,
    ) -> Vec<T> {
        let value = self.take(name).filter(|v| !v.is_null());
        let entries = value.and_then(|v| v.array()).unwrap_or_default();
        entries.iter().filter_map(&mut read).collect()
    }

    /// Whether a field is absent or `null`.
    fn is_absent(&self, name: &str) -> bool {
        let field = self.fields.get(name);
        field.is_none_or(|field| field.raw == "null")
    }

    /// A field that must be there and be an object, read by `read`.
    pub(crate) fn required_section<T: Default>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&mut Object<'a>) -> T,
    ) -> T {
        if self.is_absent(name) {
            self.missing(name);
        }
        self.section(name, read).unwrap_or_default()
    }

    /// A field of Firecracker's that this build has nothing for: it may be there, but empty. `what` says
    /// what is not built, as `"block devices are"`.
    pub(crate) fn not_built(&mut self, name: &'static str, what: &str) {
        self.known.push(name);
        self.refuse(
            name,
            format_args!("{what} not built yet; remove the key to start without it"),
        );
    }

    /// A field of Firecracker's that makes no sense here: it may be there, but empty. `why` says what is wrong with it.
    pub(crate) fn refuse(&mut self, name: &str, why: impl fmt::Display) {
        let Some(Field { key, raw }) = self.fields.remove(name) else {
            return;
        };
        let value = Value {
            raw,
            field: joined(&self.field, name),
            report: self.report,
        };
        if !value.is_nothing() {
            self.report.note(key, &value.field, || why.to_string());
        }
    }

    /// Ends reading: whatever was not asked for is unknown. One that is `null` says nothing, and clients write such where
    /// Firecracker passes over names that it does not know.
    fn refuse_the_rest(self) {
        for (name, field) in self.fields.iter().filter(|(_, field)| field.raw != "null") {
            self.report.note(field.key, &self.field, || {
                let near = match nearest(name, &self.known) {
                    Some(near) => format!("; did you mean {near:?}?"),
                    None => ";".to_owned(),
                };
                let known = self.known.join(", ");
                format!("unknown field {}{near} known are: {known}", cut(field.key))
            });
        }
    }
}

fn joined(outer: &str, name: &str) -> String {
    let name: String = name.chars().take(SHOWN_CHARS).collect();
    match outer {
        "" => name,
        outer => format!("{outer}.{name}"),
    }
}

/// A raw value, cut if it is long. Raw JSON has its control characters escaped already.
fn cut(raw: &str) -> String {
    match raw.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", raw.get(..end).unwrap_or_default()),
        None => raw.to_owned(),
    }
}

/// The known name that differs from `name` in the fewest letters, if those are few.
fn nearest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    if name.len() > SHOWN_CHARS {
        return None;
    }
    let plain = |name: &str| name.to_lowercase().replace('-', "_");
    let name = plain(name);
    let distances = known
        .iter()
        .map(|known| (distance(&name, &plain(known)), *known));
    let (letters, known) = distances.min()?;
    (letters <= 1 + name.len() / 4).then_some(known)
}

/// Letters to add, drop or change to make `b` of `a`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut next = vec![i + 1];
        let mut left = i + 1;
        for ((y, above), above_left) in b.iter().zip(row.iter().skip(1)).zip(&row) {
            left = (above_left + usize::from(x != *y))
                .min(above + 1)
                .min(left + 1);
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

/// The fields of an object as raw values, in the order of the text, duplicates and all.
struct Entries<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Entries<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// A value that is no object.
pub(crate) trait Leaf: Sized {
    /// What a message says was expected.
    const EXPECTED: &'static str;
    /// Reads it from JSON.
    fn from_json(raw: &str) -> Option<Self>;
}

macro_rules! leaf {
    ($($type:ty: $expected:literal,)*) => {$(
        impl Leaf for $type {
            const EXPECTED: &'static str = $expected;
            fn from_json(raw: &str) -> Option<Self> {
                serde_json::from_str(raw).ok()
            }
        }
    )*};
}

leaf! {
    bool: "true or false",
    u8: "a whole number from 0 to 255",
    u32: "a whole number from 0 to 4294967295",
    u64: "a whole number from 0 up",
    String: "a string",
    PathBuf: "a string with a path on the host",
}
