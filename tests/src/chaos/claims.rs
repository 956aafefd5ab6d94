//! A machine's claims as anybody can read them: the symbolic links themselves, without Godwit's code.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The newest claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    /// Its number.
    pub epoch: u64,
    /// Whose it is.
    pub host: String,
    /// Whether it carries the marker that the guest has run.
    pub running: bool,
}

/// The newest claim in `directory`, which nobody puts faults into.
pub fn newest(directory: &Path) -> Result<Newest> {
    let read = || format!("cannot read the claims in {}", directory.display());
    let mut epoch = 0;
    for entry in fs::read_dir(directory).with_context(read)? {
        let name = entry.with_context(read)?.file_name();
        epoch = epoch.max(name.to_str().and_then(|name| name.parse().ok()).unwrap_or(0));
    }
    let text = fs::read_link(directory.join(epoch.to_string())).with_context(read)?;
    let text = text.to_string_lossy();
    let host =
        text.split(' ').find_map(|word| word.strip_prefix("host=")).with_context(|| format!("no host in `{text}`"))?;
    let running = directory.join(format!("{epoch}.running")).symlink_metadata().is_ok();
    Ok(Newest { epoch, host: host.to_owned(), running })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_newest_is_the_one_with_the_largest_number() {
        let directory = tempfile::tempdir().unwrap();
        assert!(newest(directory.path()).is_err());
        for (epoch, host) in [(9, "a"), (10, "b")] {
            symlink(
                format!("godwit1 machine=m n={epoch} host={host} boot=x"),
                directory.path().join(epoch.to_string()),
            )
            .unwrap();
        }
        symlink("9.running", directory.path().join("9.running")).unwrap();
        let expected = Newest { epoch: 10, host: "b".into(), running: false };
        assert_eq!(newest(directory.path()).unwrap(), expected);
    }
}
