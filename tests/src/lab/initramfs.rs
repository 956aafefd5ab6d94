//! The initramfs of the lab's hosts: busybox, and the modules that reach their root.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::cpio::Archive;

/// Modules without which a host does not find its root; all others are loaded from there.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

const INIT: &[u8] = include_bytes!("files/host-init.sh");

/// The one kernel of a tree: its image and its modules.
pub struct Kernel {
    /// The bootable image.
    pub image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// Finds it.
    pub fn of_tree(tree: &Path) -> Result<Self> {
        let all = tree.join("lib/modules");
        let mut releases = fs::read_dir(&all).with_context(|| format!("cannot read {}", all.display()))?;
        let release = releases.next().with_context(|| format!("no kernel in {}", all.display()))??.file_name();
        let image = tree.join(format!("boot/vmlinuz-{}", release.to_string_lossy()));
        Ok(Self { image, modules: all.join(release) })
    }
}

/// Makes the initramfs for `kernel` with the busybox of `tree`.
pub fn build(tree: &Path, kernel: &Kernel) -> Result<Vec<u8>> {
    let read = |path: PathBuf| fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
    let dependencies = String::from_utf8_lossy(&read(kernel.modules.join("modules.dep"))?).into_owned();
    let mut archive = Archive::default();
    archive.directory("bin");
    archive.directory("modules");
    archive.file("init", INIT);
    archive.file("bin/busybox", &read(tree.join("bin/busybox"))?);
    let mut order = String::new();
    for path in load_order(&dependencies, &MODULES)? {
        let name = module_name(path);
        archive.file(&format!("modules/{name}"), &read(kernel.modules.join(path))?);
        order += &format!("{name}\n");
    }
    archive.file("modules/order", order.as_bytes());
    Ok(archive.finish())
}

/// The paths of `wanted` and all they depend on, each after what it needs. `dependencies` is a modules.dep.
fn load_order<'a>(dependencies: &'a str, wanted: &[&str]) -> Result<Vec<&'a str>> {
    let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
    let needs: HashMap<String, (&str, &str)> =
        lines.map(|(path, needs)| (module_name(path).replace('-', "_"), (path, needs))).collect();
    let mut order = Vec::new();
    for module in wanted {
        let Some((path, needs)) = needs.get(&format!("{module}.ko")) else {
            bail!("the kernel has no module {module}");
        };
        // modules.dep names what is loaded first last.
        for path in needs.split_whitespace().rev().chain([*path]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

fn module_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "fs/9p.ko: net/9pnet.ko fs/netfs.ko\nnet/9pnet.ko:\nfs/netfs.ko:\n\
         net/9pnet_virtio.ko: net/9pnet.ko virtio.ko\nvirtio.ko:\n";

    #[test]
    fn what_a_module_needs_is_loaded_before_it_and_once() {
        let order = load_order(DEPENDENCIES, &["9pnet_virtio", "9p"]).unwrap();
        assert_eq!(order, ["virtio.ko", "net/9pnet.ko", "net/9pnet_virtio.ko", "fs/netfs.ko", "fs/9p.ko"]);
    }

    #[test]
    fn a_module_that_is_not_there_is_named() {
        let error = load_order(DEPENDENCIES, &["overlay"]).unwrap_err();
        assert!(error.to_string().contains("overlay"));
    }
}
