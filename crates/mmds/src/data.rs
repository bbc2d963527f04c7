//! The data: one JSON document of bounded size.

use serde_json::{Map, Value};

/// The deepest nesting of a document that is merged: the parser of serde_json takes no deeper one either.
const MOST_DEPTH: usize = 128;

/// The data, none before they are put.
#[derive(Debug)]
pub(crate) struct Data {
    document: Option<Value>,
    limit_bytes: usize,
}

/// Why data are not what they were to become.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// Too much.
    #[error(
        "the metadata would be {bytes} bytes of JSON, {limit} are the most; store less, or start the VMM with a larger \
         --mmds-size-limit"
    )]
    TooLong {
        /// How much it would be.
        bytes: usize,
        /// How much it may be.
        limit: usize,
    },
    /// A patch before there is anything to be patched.
    #[error("there are no metadata to change yet; set them first (PUT /mmds)")]
    Nothing,
}

/// In which form a guest reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// JSON.
    Json,
    /// The listing of EC2's service: the keys of an object, a line each, with a slash behind those that lead on; a text as it is.
    Imds,
}

/// Why a guest gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoValue {
    /// There is nothing of this name.
    NotFound,
    /// The form has no way to write it.
    NotSupported,
}

impl Data {
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self {
            document: None,
            limit_bytes,
        }
    }

    /// An empty object before there are any.
    pub(crate) fn get(&self) -> Value {
        let document = self.document.clone();
        document.unwrap_or_else(|| Value::Object(Map::new()))
    }

    pub(crate) fn put(&mut self, document: Value) -> Result<(), DataError> {
        let bytes = document.to_string().len();
        if bytes > self.limit_bytes {
            return Err(DataError::TooLong {
                bytes,
                limit: self.limit_bytes,
            });
        }
        self.document = Some(document);
        Ok(())
    }

    /// RFC 7396. All of it or nothing.
    pub(crate) fn patch(&mut self, patch: &Value) -> Result<(), DataError> {
        let mut document = self.document.clone().ok_or(DataError::Nothing)?;
        merge(&mut document, patch, MOST_DEPTH);
        self.put(document)
    }

    /// What lies at `path`, names with slashes between them; slashes more than one, and one at the end, are as one and none.
    /// `~1` and `~0` in a name stand for `/` and `~` (RFC 6901).
    pub(crate) fn read(&self, path: &str, form: Form) -> Result<String, NoValue> {
        let mut at = self.document.as_ref().ok_or(NoValue::NotFound)?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let name = name.replace("~1", "/").replace("~0", "~");
            let next = match at {
                Value::Object(map) => map.get(&name),
                Value::Array(items) => name.parse().ok().and_then(|at: usize| items.get(at)),
                _ => None,
            };
            at = next.ok_or(NoValue::NotFound)?;
        }
        match (form, at) {
            (Form::Json, value) => Ok(value.to_string()),
            (Form::Imds, Value::String(text)) => Ok(text.clone()),
            (Form::Imds, Value::Object(map)) => {
                let line = |(name, value): (&String, &Value)| {
                    let more = if value.is_object() { "/" } else { "" };
                    format!("{name}{more}")
                };
                Ok(map.iter().map(line).collect::<Vec<_>>().join("\n"))
            }
            (Form::Imds, _) => Err(NoValue::NotSupported),
        }
    }
}

fn merge(document: &mut Value, patch: &Value, depth_left: usize) {
    let (Value::Object(changes), Some(depth_left)) = (patch, depth_left.checked_sub(1)) else {
        *document = patch.clone();
        return;
    };
    if !document.is_object() {
        *document = Value::Object(Map::new());
    }
    let Value::Object(map) = document else {
        return;
    };
    for (name, change) in changes {
        if change.is_null() {
            map.remove(name);
        } else {
            merge(map.entry(name).or_insert(Value::Null), change, depth_left);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn data(document: Value) -> Data {
        let mut data = Data::new(1000);
        data.put(document).unwrap();
        data
    }

    /// The examples of RFC 7396, appendix A: original, patch, result.
    #[test]
    fn patches_merge_as_the_rfc_says() {
        for (original, patch, result) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (
                json!({"a":"b","b":"c"}),
                json!({"a":null}),
                json!({"b":"c"}),
            ),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
            (
                json!({"a":{"b":"c"}}),
                json!({"a":{"b":"d","c":null}}),
                json!({"a":{"b":"d"}}),
            ),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"b"}), json!(["c"]), json!(["c"])),
            (json!({"a":"foo"}), json!(null), json!(null)),
            (json!({"a":"foo"}), json!("bar"), json!("bar")),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (
                json!({}),
                json!({"a":{"bb":{"ccc":null}}}),
                json!({"a":{"bb":{}}}),
            ),
        ] {
            let mut data = data(original);
            data.patch(&patch).unwrap();
            assert_eq!(data.get(), result, "{patch}");
        }
    }

    #[test]
    fn too_much_changes_nothing() {
        let mut data = Data::new(20);
        assert_eq!(data.patch(&json!({"a": 1})), Err(DataError::Nothing));
        assert_eq!(data.get(), json!({}), "clients expect an object");
        data.put(json!({"a": "0123456789"})).unwrap();
        let before = data.get();
        let e = data.patch(&json!({"b": "0123456789"})).unwrap_err();
        assert!(
            matches!(e, DataError::TooLong { limit: 20, bytes } if bytes > 20),
            "{e}"
        );
        assert!(data.put(json!("0123456789012345678")).is_err());
        assert_eq!(data.get(), before);
        data.put(json!("012345678901234567")).unwrap();
    }

    #[test]
    fn a_patch_as_deep_as_json_goes_is_merged() {
        let mut patch = json!(1);
        for _ in 0..126 {
            patch = json!({"a": patch});
        }
        let mut data = data(json!({}));
        data.patch(&patch).unwrap();
        assert_eq!(data.get(), patch);
    }

    #[test]
    fn both_forms_read_what_the_path_names() {
        let data = data(json!({
            "latest": {"meta-data": {"id": "i-1", "n": 7, "list": ["x", {"y": "z"}], "a/b": "slash", "empty": {}}}
        }));
        let json = |path| data.read(path, Form::Json);
        let imds = |path| data.read(path, Form::Imds);
        assert_eq!(imds("/"), Ok("latest/".into()));
        assert_eq!(imds(""), Ok("latest/".into()));
        assert_eq!(
            imds("/latest//meta-data/"),
            Ok("a/b\nempty/\nid\nlist\nn".into())
        );
        assert_eq!(imds("/latest/meta-data/id"), Ok("i-1".into()));
        assert_eq!(json("/latest/meta-data/id"), Ok("\"i-1\"".into()));
        assert_eq!(json("/latest/meta-data/n"), Ok("7".into()));
        assert_eq!(imds("/latest/meta-data/n"), Err(NoValue::NotSupported));
        assert_eq!(imds("/latest/meta-data/empty"), Ok(String::new()));
        assert_eq!(imds("/latest/meta-data/list/0"), Ok("x".into()));
        assert_eq!(imds("/latest/meta-data/list/1/y"), Ok("z".into()));
        assert_eq!(imds("/latest/meta-data/list/2"), Err(NoValue::NotFound));
        assert_eq!(imds("/latest/meta-data/a~1b"), Ok("slash".into()));
        assert_eq!(imds("/latest/meta-data/id/x"), Err(NoValue::NotFound));
        assert_eq!(imds("/nothing"), Err(NoValue::NotFound));
        assert_eq!(Data::new(10).read("/", Form::Imds), Err(NoValue::NotFound));
    }
}
