//! The guest `fw1`: an unmodified Debian machine on a raw disk image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::programs::GUEST_PROGRAM;
use super::tree::Recipe;

const PACKAGES: [&str; 9] =
    ["systemd", "systemd-sysv", "dbus", "udev", "kmod", "iproute2", "iputils-ping", "procps", "e2fsprogs"];

const CUSTOMIZE: &str = include_str!("files/guest-customize.sh");

/// The disk's size as mke2fs takes it. It is sparse.
const DISK_SIZE: &str = "1G";

/// Where the program of ours that works in the guest lies there.
const GUEST_PROGRAM_PATH: &str = "/usr/local/bin/lab-guest";

/// Debian's kernels that the guest can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum GuestKernel {
    /// linux-image-cloud-amd64
    #[default]
    Cloud,
    /// linux-image-amd64
    Generic,
}

/// The guest's files, as the storage host gets them.
pub struct Image {
    directory: PathBuf,
}

impl Image {
    /// Finds it under `lab`, or builds it there.
    pub fn kept(lab: &Path, kernel: GuestKernel) -> Result<Self> {
        let (name, package) = match kernel {
            GuestKernel::Cloud => ("fw1-cloud", "linux-image-cloud-amd64"),
            GuestKernel::Generic => ("fw1-generic", "linux-image-amd64"),
        };
        let packages = PACKAGES.into_iter().chain([package]).collect();
        let recipe = Recipe { name: name.into(), packages, hook: Some(CUSTOMIZE) };
        Ok(Self { directory: recipe.kept(lab, pack)? })
    }

    /// Copies disk, kernel and initrd into `directory`, and the program of `programs` that works in the guest into the
    /// copy of the disk.
    pub fn copy_to(&self, directory: &Path, programs: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        let mut copy = Command::new("cp");
        copy.args(["--sparse=always", "--reflink=auto"]);
        copy.args(["disk.img", "vmlinuz", "initrd.img"].map(|name| self.directory.join(name))).arg(directory);
        succeed(&mut copy)?;
        put(&directory.join("disk.img"), &programs.join(GUEST_PROGRAM), GUEST_PROGRAM_PATH)
    }
}

/// Makes an ext4 file system of `size` with the contents of `tree` in the file `image`.
pub fn make_ext4(image: &Path, size: &str, tree: &Path) -> Result<()> {
    let mut command = Command::new("mke2fs");
    succeed(command.args(["-q", "-F", "-t", "ext4", "-d"]).arg(tree).arg(image).arg(size))
}

/// Turns the tree in `directory` into a disk with its kernel and initrd beside it.
fn pack(directory: &Path) -> Result<()> {
    let tree = directory.join("tree");
    for (link, name) in [("vmlinuz", "vmlinuz"), ("initrd.img", "initrd.img")] {
        // Debian's links to its newest kernel, which are relative.
        fs::copy(tree.join(link), directory.join(name)).with_context(|| format!("the tree has no {link}"))?;
    }
    make_ext4(&directory.join("disk.img"), DISK_SIZE, &tree)?;
    fs::remove_dir_all(&tree).context("cannot remove the tree that the disk was made of")
}

/// Writes `program` into an ext4 image that nobody has mounted.
fn put(image: &Path, program: &Path, path: &str) -> Result<()> {
    // debugfs ends with 0 whatever happens; what it wrote is looked at afterwards.
    let requests = [format!("write {} {path}", program.display()), format!("set_inode_field {path} mode 0100755")];
    for request in requests {
        succeed(Command::new("debugfs").args(["-w", "-R", &request]).arg(image))?;
    }
    let listed = Command::new("debugfs").args(["-R", &format!("stat {path}")]).arg(image).output()?;
    let size = fs::metadata(program)?.len();
    if !String::from_utf8_lossy(&listed.stdout).contains(&format!("Size: {size}")) {
        bail!("{} could not be written into {}", program.display(), image.display());
    }
    Ok(())
}

/// Runs a command that must succeed.
fn succeed(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{:?}: {}", command.get_program(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
