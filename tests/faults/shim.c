/* Fails, shortens or kills at the n-th call of a kind below one folder. Preloaded into a process that
 * forks for each fault; a child arms it, and other processes are left alone.
 *
 * Kinds, in the order of KINDS in injector.py.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN_READ, OPEN_WRITE, READ, WRITE, SYNC, CLOSE, RENAME, TRUNCATE, MKDIR, REMOVE, LINK, LIST,
       STAT, LOCK, MAP, SPACE, KINDS };
enum { SHORT = -1, KILL = -2 };
#define FILES 4096

struct shared { long counts[KINDS]; long fired; };
static struct shared *shared;
static int armed, kind, error, sticky;
static long number;
static char prefix[4096];
static size_t length;
static unsigned char below[FILES]; /* descriptors of files below the folder */

__attribute__((constructor)) static void begin(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

struct shared *fault_shared(void) { return shared; }

/* Arm: fault `e` at call `n` of kind `k` below `folder`; also at later ones if `stays`. k < 0: count. */
void fault_set(int k, long n, int e, int stays, const char *folder) {
    memset(shared, 0, sizeof *shared);
    memset(below, 0, sizeof below);
    length = strlen(folder);
    memcpy(prefix, folder, length + 1);
    kind = k; number = n; error = e; sticky = stays; armed = 1;
}

static int is_below(int at, const char *path) {
    if (!armed || !path) return 0;
    if (path[0] == '/')
        return !strncmp(path, prefix, length) && (path[length] == '/' || !path[length]);
    return at >= 0 && at < FILES && below[at];
}

static int has(int fd) { return armed && fd >= 0 && fd < FILES && below[fd]; }

/* 0: go on. 1: fail, errno is set. SHORT: do less. */
static int fault(int k) {
    long n = __atomic_add_fetch(&shared->counts[k], 1, __ATOMIC_SEQ_CST);
    if (k != kind || !(n == number || (sticky && n > number))) return 0;
    __atomic_add_fetch(&shared->fired, 1, __ATOMIC_SEQ_CST);
    if (error == KILL) { kill(getpid(), SIGKILL); for (;;) pause(); }
    if (error == SHORT) return SHORT;
    errno = error;
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define LESS(size) ((size) > 1 ? (size) / 2 : (size))

static int opened(int fd, int is) {
    if (fd >= 0 && fd < FILES) below[fd] = is;
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); } \
        int is = is_below(-1, path); \
        if (is && fault(flags & O_ACCMODE ? OPEN_WRITE : OPEN_READ) > 0) return -1; \
        return opened(real(path, flags, mode), is); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); } \
        int is = is_below(at, path); \
        if (is && fault(flags & O_ACCMODE ? OPEN_WRITE : OPEN_READ) > 0) return -1; \
        return opened(real(at, path, flags, mode), is); \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL(int, close, int);
    int is = has(fd), failed;
    if (!is) return real(fd);
    below[fd] = 0;
    failed = fault(CLOSE) > 0;
    int e = errno, done = real(fd); /* a descriptor is closed, also if that fails */
    if (failed) { errno = e; return -1; }
    return done;
}

#define DUP(name, parameters, call, ...) \
    int name parameters { REAL(int, name, __VA_ARGS__); return opened(real call, has(from)); }
DUP(dup, (int from), (from), int)
DUP(dup2, (int from, int to), (from, to), int, int)
DUP(dup3, (int from, int to, int flags), (from, to, flags), int, int, int)

#define TRANSFER(kind, type, name, size, parameters, call, less, ...) \
    type name parameters { \
        REAL(type, name, __VA_ARGS__); \
        if (!has(fd)) return real call; \
        int what = fault(kind); \
        if (what > 0) return -1; \
        return what == SHORT ? real less : real call; \
    }
TRANSFER(READ, ssize_t, read, n, (int fd, void *b, size_t n), (fd, b, n), (fd, b, LESS(n)),
         int, void *, size_t)
TRANSFER(READ, ssize_t, pread, n, (int fd, void *b, size_t n, off_t o), (fd, b, n, o),
         (fd, b, LESS(n), o), int, void *, size_t, off_t)
TRANSFER(READ, ssize_t, pread64, n, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o),
         (fd, b, LESS(n), o), int, void *, size_t, off64_t)
TRANSFER(WRITE, ssize_t, write, n, (int fd, const void *b, size_t n), (fd, b, n), (fd, b, LESS(n)),
         int, const void *, size_t)
TRANSFER(WRITE, ssize_t, pwrite, n, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o),
         (fd, b, LESS(n), o), int, const void *, size_t, off_t)
TRANSFER(WRITE, ssize_t, pwrite64, n, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o),
         (fd, b, LESS(n), o), int, const void *, size_t, off64_t)

/* of a vector, the first buffer or half of it */
static struct iovec half(const struct iovec *v) {
    struct iovec first = {v->iov_base, LESS(v->iov_len)};
    return first;
}
#define VECTOR(kind, name, type) \
    ssize_t name(int fd, const struct iovec *v, int n, type o) { \
        REAL(ssize_t, name, int, const struct iovec *, int, type); \
        if (!has(fd)) return real(fd, v, n, o); \
        int what = fault(kind); \
        if (what > 0) return -1; \
        if (what != SHORT) return real(fd, v, n, o); \
        struct iovec first = half(v); \
        return real(fd, &first, 1, o); \
    }
VECTOR(READ, preadv, off_t)
VECTOR(READ, preadv64, off64_t)
VECTOR(WRITE, pwritev, off_t)
VECTOR(WRITE, pwritev64, off64_t)
#define PLAIN_VECTOR(kind, name) \
    ssize_t name(int fd, const struct iovec *v, int n) { \
        REAL(ssize_t, name, int, const struct iovec *, int); \
        if (!has(fd)) return real(fd, v, n); \
        int what = fault(kind); \
        if (what > 0) return -1; \
        if (what != SHORT) return real(fd, v, n); \
        struct iovec first = half(v); \
        return real(fd, &first, 1); \
    }
PLAIN_VECTOR(READ, readv)
PLAIN_VECTOR(WRITE, writev)

TRANSFER(WRITE, ssize_t, sendfile, n, (int fd, int in, off_t *o, size_t n), (fd, in, o, n),
         (fd, in, o, LESS(n)), int, int, off_t *, size_t)
TRANSFER(WRITE, ssize_t, sendfile64, n, (int fd, int in, off64_t *o, size_t n), (fd, in, o, n),
         (fd, in, o, LESS(n)), int, int, off64_t *, size_t)
TRANSFER(WRITE, ssize_t, copy_file_range, n,
         (int in, off64_t *i, int fd, off64_t *o, size_t n, unsigned f), (in, i, fd, o, n, f),
         (in, i, fd, o, LESS(n), f), int, off64_t *, int, off64_t *, size_t, unsigned)

/* calls that fail or not; `is` says whether the call is below the folder */
#define SIMPLE(kind, type, failure, name, is, parameters, call, ...) \
    type name parameters { \
        REAL(type, name, __VA_ARGS__); \
        if ((is) && fault(kind) > 0) return failure; \
        return real call; \
    }
SIMPLE(SYNC, int, -1, fsync, has(fd), (int fd), (fd), int)
SIMPLE(SYNC, int, -1, fdatasync, has(fd), (int fd), (fd), int)
SIMPLE(TRUNCATE, int, -1, ftruncate, has(fd), (int fd, off_t n), (fd, n), int, off_t)
SIMPLE(TRUNCATE, int, -1, ftruncate64, has(fd), (int fd, off64_t n), (fd, n), int, off64_t)
SIMPLE(TRUNCATE, int, errno, posix_fallocate, has(fd), (int fd, off_t o, off_t n), (fd, o, n), int, off_t,
       off_t)
SIMPLE(TRUNCATE, int, errno, posix_fallocate64, has(fd), (int fd, off64_t o, off64_t n), (fd, o, n), int,
       off64_t, off64_t)
SIMPLE(TRUNCATE, int, -1, fallocate, has(fd), (int fd, int m, off_t o, off_t n), (fd, m, o, n), int, int,
       off_t, off_t)
SIMPLE(LOCK, int, -1, flock, has(fd), (int fd, int what), (fd, what), int, int)
SIMPLE(RENAME, int, -1, rename, is_below(-1, b), (const char *a, const char *b), (a, b), const char *,
       const char *)
SIMPLE(RENAME, int, -1, renameat, is_below(y, b), (int x, const char *a, int y, const char *b),
       (x, a, y, b), int, const char *, int, const char *)
SIMPLE(RENAME, int, -1, renameat2, is_below(y, b),
       (int x, const char *a, int y, const char *b, unsigned f), (x, a, y, b, f), int, const char *, int,
       const char *, unsigned)
SIMPLE(MKDIR, int, -1, mkdir, is_below(-1, p), (const char *p, mode_t m), (p, m), const char *, mode_t)
SIMPLE(MKDIR, int, -1, mkdirat, is_below(d, p), (int d, const char *p, mode_t m), (d, p, m), int,
       const char *, mode_t)
SIMPLE(REMOVE, int, -1, unlink, is_below(-1, p), (const char *p), (p), const char *)
SIMPLE(REMOVE, int, -1, rmdir, is_below(-1, p), (const char *p), (p), const char *)
SIMPLE(REMOVE, int, -1, unlinkat, is_below(d, p), (int d, const char *p, int f), (d, p, f), int,
       const char *, int)
SIMPLE(LINK, int, -1, link, is_below(-1, b), (const char *a, const char *b), (a, b), const char *,
       const char *)
SIMPLE(LINK, int, -1, linkat, is_below(y, b), (int x, const char *a, int y, const char *b, int f),
       (x, a, y, b, f), int, const char *, int, const char *, int)
SIMPLE(LINK, int, -1, symlink, is_below(-1, b), (const char *a, const char *b), (a, b), const char *,
       const char *)
SIMPLE(LIST, DIR *, NULL, opendir, is_below(-1, p), (const char *p), (p), const char *)
SIMPLE(LIST, DIR *, NULL, fdopendir, has(fd), (int fd), (fd), int)
SIMPLE(STAT, int, -1, stat, is_below(-1, p), (const char *p, struct stat *s), (p, s), const char *,
       struct stat *)
SIMPLE(STAT, int, -1, stat64, is_below(-1, p), (const char *p, struct stat64 *s), (p, s), const char *,
       struct stat64 *)
SIMPLE(STAT, int, -1, lstat, is_below(-1, p), (const char *p, struct stat *s), (p, s), const char *,
       struct stat *)
SIMPLE(STAT, int, -1, lstat64, is_below(-1, p), (const char *p, struct stat64 *s), (p, s), const char *,
       struct stat64 *)
SIMPLE(STAT, int, -1, fstat, has(fd), (int fd, struct stat *s), (fd, s), int, struct stat *)
SIMPLE(STAT, int, -1, fstat64, has(fd), (int fd, struct stat64 *s), (fd, s), int, struct stat64 *)
SIMPLE(STAT, int, -1, fstatat, is_below(d, p), (int d, const char *p, struct stat *s, int f),
       (d, p, s, f), int, const char *, struct stat *, int)
SIMPLE(STAT, int, -1, fstatat64, is_below(d, p), (int d, const char *p, struct stat64 *s, int f),
       (d, p, s, f), int, const char *, struct stat64 *, int)
SIMPLE(STAT, int, -1, statx, is_below(d, p),
       (int d, const char *restrict p, int f, unsigned m, struct statx *restrict s), (d, p, f, m, s), int,
       const char *, int, unsigned, struct statx *)
SIMPLE(SPACE, int, -1, statvfs, is_below(-1, p), (const char *p, struct statvfs *s), (p, s), const char *,
       struct statvfs *)
SIMPLE(SPACE, int, -1, statvfs64, is_below(-1, p), (const char *p, struct statvfs64 *s), (p, s),
       const char *, struct statvfs64 *)
SIMPLE(MAP, void *, MAP_FAILED, mmap, has(fd), (void *a, size_t n, int p, int f, int fd, off_t o),
       (a, n, p, f, fd, o), void *, size_t, int, int, int, off_t)
SIMPLE(MAP, void *, MAP_FAILED, mmap64, has(fd), (void *a, size_t n, int p, int f, int fd, off64_t o),
       (a, n, p, f, fd, o), void *, size_t, int, int, int, off64_t)
