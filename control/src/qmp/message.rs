//! QMP messages: one JSON object a line.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// What a command answers.
pub type Answer = Result<Value, QmpError>;

/// A command's arguments, by name.
pub type Arguments = Map<String, Value>;

/// The class of an error: clients tell the two apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Anything that has no class of its own.
    GenericError,
    /// The command does not exist, or not yet.
    CommandNotFound,
}

impl ErrorClass {
    /// As it stands in the answer.
    pub fn name(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
        }
    }
}

/// Why a command failed, for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// For programs.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

impl QmpError {
    /// An error of class GenericError.
    pub fn generic(desc: impl Into<String>) -> Self {
        QmpError { class: ErrorClass::GenericError, desc: desc.into() }
    }

    /// The answer to a command that does not exist.
    pub fn command_not_found(command: &str) -> Self {
        QmpError {
            class: ErrorClass::CommandNotFound,
            desc: format!("The command {command} has not been found (query-commands lists those that exist)"),
        }
    }
}

/// A command from a client.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Its name.
    pub command: String,
    /// Its arguments; empty if none were given.
    pub arguments: Arguments,
    /// Given back with the answer.
    pub id: Option<Value>,
}

/// A line that is not a command, and the id that it carries if one can be made out.
#[derive(Debug, PartialEq)]
pub struct BadRequest {
    /// Given back with the error.
    pub id: Option<Value>,
    /// What is wrong with the line.
    pub error: QmpError,
}

impl Request {
    /// Reads a line.
    pub fn parse(line: &[u8]) -> Result<Self, BadRequest> {
        let value: Value = serde_json::from_slice(line)
            .map_err(|error| BadRequest { id: None, error: QmpError::generic(format!("Invalid JSON: {error}")) })?;
        let Value::Object(mut object) = value else {
            let error = QmpError::generic("QMP input must be a JSON object");
            return Err(BadRequest { id: None, error });
        };
        let id = object.remove("id");
        match Self::from_object(object) {
            Ok((command, arguments)) => Ok(Request { command, arguments, id }),
            Err(desc) => Err(BadRequest { id, error: QmpError::generic(desc) }),
        }
    }

    fn from_object(mut object: Map<String, Value>) -> Result<(String, Arguments), String> {
        let command = match object.remove("execute") {
            Some(Value::String(command)) => command,
            Some(_) => return Err("QMP input member 'execute' must be a string".into()),
            None => return Err("QMP input lacks member 'execute'".into()),
        };
        let arguments = match object.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err("QMP input member 'arguments' must be an object".into()),
            None => Arguments::new(),
        };
        match object.keys().next() {
            Some(key) => Err(format!("QMP input member '{key}' is unexpected")),
            None => Ok((command, arguments)),
        }
    }
}

/// Reads a command's arguments into `T`, which is to refuse unknown fields.
pub fn arguments<T: DeserializeOwned>(command: &str, arguments: Arguments) -> Result<T, QmpError> {
    serde_json::from_value(Value::Object(arguments)).map_err(|error| {
        let text = error
            .to_string()
            .replace("unknown field", "unknown argument")
            .replace("missing field", "missing argument")
            .replace("there are no fields", "the command takes none");
        QmpError::generic(format!("{command}: {text}"))
    })
}

/// The first line that a client reads.
pub fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [] } })
}

/// Godwit's own version, in the place where QEMU has its.
pub fn version() -> Value {
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("godwit ", env!("CARGO_PKG_VERSION")),
    })
}

/// The answer to a command.
pub fn response(answer: Answer, id: Option<Value>) -> Value {
    let mut response = match answer {
        Ok(value) => json!({ "return": value }),
        Err(error) => json!({ "error": { "class": error.class.name(), "desc": error.desc } }),
    };
    if let (Some(id), Value::Object(object)) = (id, &mut response) {
        object.insert("id".into(), id);
    }
    response
}

/// An event that happens now.
pub fn event(name: &str, data: Value) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
    match data {
        Value::Null => json!({ "event": name, "timestamp": timestamp }),
        data => json!({ "event": name, "data": data, "timestamp": timestamp }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refusal(line: &str) -> (Option<Value>, String) {
        let bad = Request::parse(line.as_bytes()).unwrap_err();
        (bad.id, bad.error.desc)
    }

    #[test]
    fn a_command_with_all_its_parts() {
        let request = Request::parse(br#"{"execute":"stop","arguments":{"a":1},"id":[7]}"#).unwrap();
        assert_eq!(request.command, "stop");
        assert_eq!(request.arguments["a"], 1);
        assert_eq!(request.id, Some(json!([7])));
    }

    #[test]
    fn a_wrong_line_is_named_and_keeps_its_id() {
        assert_eq!(refusal("[]").1, "QMP input must be a JSON object");
        assert_eq!(refusal(r#"{"id":1}"#), (Some(json!(1)), "QMP input lacks member 'execute'".into()));
        assert_eq!(refusal(r#"{"execute":5}"#).1, "QMP input member 'execute' must be a string");
        assert_eq!(refusal(r#"{"execute":"a","arguments":[]}"#).1, "QMP input member 'arguments' must be an object");
        assert_eq!(refusal(r#"{"execute":"a","x":0}"#).1, "QMP input member 'x' is unexpected");
        assert!(refusal("{").1.starts_with("Invalid JSON"));
        assert!(refusal(&"[".repeat(100_000)).1.starts_with("Invalid JSON"));
    }

    #[test]
    fn an_unknown_argument_is_named() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Known {
            #[serde(rename = "size")]
            _size: u64,
        }
        let given = |text: &str| serde_json::from_str::<Arguments>(text).unwrap();
        let error = arguments::<Known>("pmemsave", given(r#"{"size":1,"colour":2}"#)).unwrap_err();
        assert!(error.desc.contains("unknown argument `colour`"), "{error}");
        let error = arguments::<Known>("pmemsave", given("{}")).unwrap_err();
        assert!(error.desc.contains("missing argument `size`"), "{error}");
    }

    #[test]
    fn answers_and_events_have_qmps_form() {
        assert_eq!(response(Ok(json!({})), Some(json!("x"))), json!({"return": {}, "id": "x"}));
        let error = response(Err(QmpError::generic("no")), None);
        assert_eq!(error, json!({"error": {"class": "GenericError", "desc": "no"}}));
        let event = event("STOP", Value::Null);
        assert!(event["timestamp"]["microseconds"].as_u64().is_some_and(|us| us < 1_000_000));
        assert_eq!(event.get("data"), None);
        assert!(greeting()["QMP"]["version"]["qemu"]["major"].is_u64());
    }

    proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::parse(&line);
        }

        #[test]
        fn a_command_is_read_back(command in "[a-z-]{1,20}", id in any::<i64>(), value in any::<String>()) {
            let line = json!({"execute": command, "arguments": {"value": value}, "id": id}).to_string();
            let request = Request::parse(line.as_bytes()).unwrap();
            prop_assert_eq!(request.command, command);
            prop_assert_eq!(&request.arguments["value"], &json!(value));
            prop_assert_eq!(request.id, Some(json!(id)));
        }
    }
}
