//! `API.md`, made of the descriptions in `resources/openapi`; `tests.rs` proves that these say what the program takes.
//!
//! `alveole.yaml` extends bodies of `firecracker.yaml` by definitions that name one with `x-extends`; what it says of a field comes
//! before what the contract says. Which paths are built is asked of the table of routes.

use std::collections::BTreeSet;
use std::fmt::Write;

use yaml_rust2::{Yaml, YamlLoader};

use super::{NAME, ROUTES, Take, parts};

const HEAD: &str = "\
<!-- Made of resources/openapi by `ALVEOLE_UPDATE_API_MD=1 cargo test -p alveole-api-server --lib documentation`. A test fails where
     this file is not what the generator writes: change the YAML. -->

# The API

What `alveole-vmm` serves on its unix socket, as HTTP with JSON. What is Firecracker's is described in the words of its
[contract](../../resources/openapi/firecracker.yaml) (Apache-2.0); what is not in it is marked with **+** and comes from
[alveole.yaml](../../resources/openapi/alveole.yaml). How requests are served, and what bounds them: [README.md](README.md).

Every request can be refused: with 400 and an [Error](#error) that says what failed, why, and what to do. A field that is unknown is refused, too;
an optional one may be `null`. A file for `--config-file` is a [FullVmConfiguration](#fullvmconfiguration).

";

/// Both descriptions.
struct Descriptions {
    theirs: Yaml,
    ours: Yaml,
}

/// What can be asked: a method of a path.
struct Operation<'a> {
    path: &'a str,
    /// In lower case.
    method: &'a str,
    what: &'a Yaml,
    is_ours: bool,
}

/// A field of a body.
struct Field<'a> {
    name: &'a str,
    /// What the contract says of it, if anything.
    theirs: &'a Yaml,
    /// What we say, if anything.
    ours: &'a Yaml,
    is_required: bool,
    /// A value that is refused today, or of a choice all that are.
    refused: Option<&'a Yaml>,
}

impl Descriptions {
    fn read() -> Self {
        let load = |text| YamlLoader::load_from_str(text).unwrap().swap_remove(0);
        Self {
            theirs: load(include_str!(
                "../../../../resources/openapi/firecracker.yaml"
            )),
            ours: load(include_str!("../../../../resources/openapi/alveole.yaml")),
        }
    }

    /// All there is to ask, theirs first, as they stand there.
    fn operations(&self) -> Vec<Operation<'_>> {
        let mut all = Vec::new();
        for (file, is_ours) in [(&self.theirs, false), (&self.ours, true)] {
            for (path, methods) in entries(&file["paths"]) {
                for (method, what) in entries(methods) {
                    all.push(Operation {
                        path,
                        method,
                        what,
                        is_ours,
                    });
                }
            }
        }
        all
    }

    fn definition(&self, name: &str) -> &Yaml {
        match &self.theirs["definitions"][name] {
            Yaml::BadValue => &self.ours["definitions"][name],
            theirs => theirs,
        }
    }

    /// What extends the definition `name`.
    fn extension(&self, name: &str) -> &Yaml {
        entries(&self.ours["definitions"])
            .map(|(_, definition)| definition)
            .find(|definition| definition["x-extends"].as_str() == Some(name))
            .unwrap_or(&Yaml::BadValue)
    }

    fn is_ours(&self, name: &str) -> bool {
        self.theirs["definitions"][name].is_badvalue()
    }

    /// The fields of a body that is an object.
    fn fields(&self, name: &str) -> Vec<Field<'_>> {
        let (own, extension) = (self.definition(name), self.extension(name));
        let is_ours = self.is_ours(name);
        let names = entries(&own["properties"]).chain(entries(&extension["properties"]));
        let mut seen = BTreeSet::new();
        let names = names
            .map(|(name, _)| name)
            .filter(|name| seen.insert(*name));
        let required = |field: &str| {
            [own, extension]
                .iter()
                .flat_map(|of| list(&of["required"]))
                .any(|name| name.as_str() == Some(field))
        };
        let field = |name| {
            let own = &own["properties"][name];
            let (theirs, ours) = if is_ours {
                (&Yaml::BadValue, own)
            } else {
                (own, &extension["properties"][name])
            };
            let refused = &extension["x-refused"][name];
            Field {
                name,
                theirs,
                ours,
                is_required: required(name),
                refused: (!refused.is_badvalue()).then_some(refused),
            }
        };
        names.map(field).collect()
    }

    /// The definitions that bodies and answers of what is built have, and those in them.
    fn used(&self) -> BTreeSet<String> {
        let mut used = BTreeSet::from(["FullVmConfiguration".to_owned()]);
        for operation in self.operations().iter().filter(|o| is_built(o)) {
            named_in(operation.what, &mut used);
        }
        let mut done = BTreeSet::new();
        while let Some(name) = used.difference(&done).next().cloned() {
            for field in self.fields(&name) {
                // One of which nothing can be had leads nowhere.
                if field.refused.is_none() || !field.is_refused_whole() {
                    named_in(field.theirs, &mut used);
                    named_in(field.ours, &mut used);
                }
            }
            done.insert(name);
        }
        used
    }
}

impl Field<'_> {
    /// What is said of it under `key`, by us if we do.
    fn said(&self, key: &str) -> &Yaml {
        match &self.ours[key] {
            Yaml::BadValue => &self.theirs[key],
            ours => ours,
        }
    }

    fn is_ours(&self) -> bool {
        self.theirs.is_badvalue()
    }

    /// Not only one of its values is refused: a choice has others.
    fn is_refused_whole(&self) -> bool {
        let is_choice =
            self.said("enum").is_array() || self.said("type").as_str() == Some("boolean");
        !is_choice && self.theirs["$ref"].as_str() != Some("#/definitions/CpuTemplate")
    }

    /// Values that are refused today: one, or those of a choice.
    fn refused_values(&self) -> Vec<&Yaml> {
        match self.refused {
            Some(values) if !self.is_refused_whole() && values.is_array() => list(values).collect(),
            value => value.into_iter().collect(),
        }
    }

    /// The kind of value, in Markdown.
    fn shape(&self) -> String {
        match (self.said("$ref").as_str(), self.said("type").as_str()) {
            (Some(name), _) if self.is_refused_whole() && self.refused.is_some() => {
                name_of(name).into()
            }
            (Some(name), _) => link(name),
            (None, Some("array")) => match self.said("items")["$ref"].as_str() {
                Some(name) if self.refused.is_some() => format!("array of {}", name_of(name)),
                Some(name) => format!("array of {}", link(name)),
                None => format!(
                    "array of {}s",
                    self.said("items")["type"].as_str().unwrap_or("value")
                ),
            },
            (None, kind) => kind.unwrap_or_default().into(),
        }
    }

    /// What values it may have, in Markdown.
    fn limits(&self) -> String {
        let mut parts = Vec::new();
        let values: Vec<_> = list(self.said("enum"))
            .map(|value| {
                let ours = !self.is_ours() && !list(&self.theirs["enum"]).any(|v| v == value);
                format!("`{}`{}", scalar(value), if ours { " **+**" } else { "" })
            })
            .collect();
        if !values.is_empty() {
            parts.push(values.join(", "));
        }
        let number = |key| self.said(key).as_i64();
        let unit = if number("maxLength").is_some() {
            " characters"
        } else {
            ""
        };
        let (from, to) = (
            number("minimum").or(number("minLength")),
            number("maximum").or(number("maxLength")),
        );
        match (from, to) {
            (Some(from), Some(to)) => parts.push(format!("{from} to {to}{unit}")),
            (Some(from), None) => parts.push(format!("from {from}{unit}")),
            (None, Some(to)) => parts.push(format!("to {to}{unit}")),
            (None, None) => {}
        }
        parts.join("; ")
    }

    fn description(&self) -> String {
        let mut text = self
            .said("description")
            .as_str()
            .unwrap_or_default()
            .trim()
            .to_owned();
        let refused: Vec<_> = self.refused_values().into_iter().map(scalar).collect();
        if !refused.is_empty() && self.is_refused_whole() {
            text.push_str(" **Refused today.**");
        } else if !refused.is_empty() {
            write!(text, " **Refused today: `{}`.**", refused.join("`, `")).unwrap();
        }
        cell(&text)
    }
}

/// The name and value of each field of a mapping; none if it is none.
fn entries(of: &Yaml) -> impl Iterator<Item = (&str, &Yaml)> {
    let hash = of.as_hash().into_iter().flatten();
    hash.map(|(key, value)| (key.as_str().unwrap(), value))
}

fn list(of: &Yaml) -> impl Iterator<Item = &Yaml> {
    of.as_vec().into_iter().flatten()
}

/// A plain value as JSON has it, but for the quotes of a string.
fn scalar(value: &Yaml) -> String {
    match json(value) {
        serde_json::Value::String(text) => text,
        other => other.to_string(),
    }
}

fn json(value: &Yaml) -> serde_json::Value {
    match value {
        Yaml::Boolean(value) => (*value).into(),
        Yaml::Integer(value) => (*value).into(),
        Yaml::String(text) => text.as_str().into(),
        Yaml::Array(values) => values.iter().map(json).collect(),
        Yaml::Hash(_) => entries(value)
            .map(|(k, v)| (k.to_owned(), json(v)))
            .collect(),
        Yaml::Null => serde_json::Value::Null,
        other => panic!("{other:?}"),
    }
}

/// `#/definitions/Name` as a link to its section.
fn link(reference: &str) -> String {
    let name = name_of(reference);
    format!("[{name}](#{})", name.to_lowercase())
}

fn name_of(reference: &str) -> &str {
    reference.rsplit('/').next().unwrap()
}

/// Every definition that stands somewhere in `what`.
fn named_in(what: &Yaml, found: &mut BTreeSet<String>) {
    list(what).for_each(|value| named_in(value, found));
    if let Some(hash) = what.as_hash() {
        for (key, value) in hash {
            match (key.as_str(), value.as_str()) {
                (Some("$ref"), Some(name)) => {
                    found.insert(name_of(name).into());
                }
                _ => named_in(value, found),
            }
        }
    }
}

/// Text for one cell of a table: one line, without what ends a cell.
fn cell(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    words.join(" ").replace('|', "\\|").replace('<', "&lt;")
}

/// The path as the table of routes has it.
fn route_of(path: &str) -> String {
    let is_name = |part: &str| part.starts_with('{');
    let parts = parts(path).map(|part| if is_name(part) { NAME } else { part });
    format!("/{}", parts.collect::<Vec<_>>().join("/"))
}

fn is_built(operation: &Operation<'_>) -> bool {
    let path = route_of(operation.path);
    ROUTES.iter().any(|(method, route, take)| {
        operation.method.eq_ignore_ascii_case(method)
            && *route == path
            && !matches!(take, Take::NotBuilt(_))
    })
}

/// The whole file.
fn documentation() -> String {
    let descriptions = Descriptions::read();
    let mut text = HEAD.to_owned();
    text.push_str("## Requests\n");
    let operations = descriptions.operations();
    let mut done = BTreeSet::new();
    for path in operations.iter().map(|o| o.path) {
        let of_path: Vec<_> = operations.iter().filter(|o| o.path == path).collect();
        if !done.insert(path) {
            continue;
        }
        write!(text, "\n### {path}\n\n").unwrap();
        for operation in of_path {
            operation_text(operation, &mut text);
        }
    }
    text.push_str("\n## Bodies and answers\n\nOf what is built. Fields without a default may be left out unless they are required.\n");
    for name in descriptions.used() {
        definition_text(&descriptions, &name, &mut text);
    }
    text
}

fn operation_text(operation: &Operation<'_>, text: &mut String) {
    let method = operation.method.to_uppercase();
    let mark = if operation.is_ours { " **+**" } else { "" };
    let said = |key: &str| cell(operation.what[key].as_str().unwrap_or_default());
    let summary = said("summary");
    write!(
        text,
        "- **{method}**{mark} {}.",
        summary.trim_end_matches('.')
    )
    .unwrap();
    if !is_built(operation) {
        let told = " *Answers 400: not built yet.*";
        text.push_str(if said("summary").contains("Not built yet") {
            ""
        } else {
            told
        });
        text.push('\n');
        return;
    }
    if !said("description").is_empty() {
        write!(text, " {}", said("description")).unwrap();
    }
    text.push('\n');
    for parameter in list(&operation.what["parameters"]) {
        let name = parameter["name"].as_str().unwrap();
        if parameter["in"].as_str() == Some("path") {
            let about = cell(parameter["description"].as_str().unwrap_or_default());
            writeln!(text, "  - `{name}`: {about}").unwrap();
            continue;
        }
        let schema = &parameter["schema"];
        match schema["$ref"].as_str() {
            Some(reference) => writeln!(text, "  - body: {}", link(reference)).unwrap(),
            None => {
                for (name, field) in entries(&schema["properties"]) {
                    let about = cell(field["description"].as_str().unwrap_or_default());
                    let kind = field["type"].as_str().unwrap_or_default();
                    let needed = list(&schema["required"]).any(|n| n.as_str() == Some(name));
                    let needed = if needed { ", required" } else { "" };
                    writeln!(text, "  - body: `{name}` ({kind}{needed}): {about}").unwrap();
                }
            }
        }
    }
    for (status, answer) in operation.what["responses"].as_hash().unwrap() {
        // Whatever else happens is refused in the same words.
        let Some(status) = status.as_i64() else {
            continue;
        };
        let about = cell(answer["description"].as_str().unwrap_or_default());
        let body = match answer["schema"]["$ref"].as_str() {
            Some(reference) if name_of(reference) != "Error" => format!(" ({})", link(reference)),
            _ => String::new(),
        };
        writeln!(text, "  - {status}: {about}{body}").unwrap();
    }
}

fn definition_text(descriptions: &Descriptions, name: &str, text: &mut String) {
    let (own, extension) = (descriptions.definition(name), descriptions.extension(name));
    write!(text, "\n### {name}\n\n").unwrap();
    for about in [own, extension] {
        if let Some(about) = about["description"].as_str() {
            write!(text, "{}\n\n", cell(about)).unwrap();
        }
    }
    let fields = descriptions.fields(name);
    if fields.is_empty() {
        let values: Vec<_> = list(&own["enum"])
            .map(|v| format!("`{}`", scalar(v)))
            .collect();
        let kind = own["type"].as_str().unwrap_or("any value");
        match values.is_empty() {
            true => writeln!(text, "Any {kind}.").unwrap(),
            false => writeln!(text, "One of {}.", values.join(", ")).unwrap(),
        }
        return;
    }
    text.push_str("| field | type | default | limits | |\n|---|---|---|---|---|\n");
    for field in fields {
        let mark = if field.is_ours() && !descriptions.is_ours(name) {
            " **+**"
        } else {
            ""
        };
        let default = match field.said("default") {
            _ if field.is_required => "required".into(),
            Yaml::BadValue | Yaml::Null => String::new(),
            value => format!("`{}`", scalar(value)),
        };
        let (shape, limits, about) = (field.shape(), field.limits(), field.description());
        writeln!(
            text,
            "| `{}`{mark} | {shape} | {default} | {limits} | {about} |",
            field.name
        )
        .unwrap();
    }
}

mod tests;
