// Matrix product in f32 (src/ops/matmul.rs).
//
//   c[z, m, n] = sum over k of a[z, m, k] b[z, k, n]
//
// Layout: c is dense row-major; a and b are read by their strides, in elements, so that transposed and spread-out
// factors need no copy.
// Grid: a workgroup of 256 threads computes a tile of 64 x 64, each thread 4 x 4 of it; workgroups are counted over x,
// then y: tiles of a row of c first, then rows of tiles, then z.
// Invariants: every element of c is written exactly once; what lies outside a factor counts as zero; all threads of a
// workgroup reach every barrier.
// Numerics: f32, k ascending, one sum an element: equal bits every time.
//
// The launcher (src/backend/matmul_exact.rs) sets along which size neighbouring threads read each factor.

struct Scalars {
    m: u32,
    n: u32,
    k: u32,
    z: u32,
    // Of a along z, m and k; of b along z, k and n.
    a_z: u32,
    a_m: u32,
    a_k: u32,
    b_z: u32,
    b_k: u32,
    b_n: u32,
}

@group(0) @binding(0) var<storage, read_write> a: array<f32>;
@group(0) @binding(1) var<storage, read_write> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> c: array<f32>;
@group(0) @binding(3) var<uniform> s: Scalars;

const TILE: u32 = 64u;
const DEPTH: u32 = 16u;

var<workgroup> slice_a: array<array<f32, 64>, 16>;
var<workgroup> slice_b: array<array<f32, 64>, 16>;

@compute @workgroup_size({{ workgroup }})
fn matmul(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let columns = (s.n + TILE - 1u) / TILE;
    let rows = (s.m + TILE - 1u) / TILE;
    let tile = id.y * count.x + id.x;
    let z = tile / (rows * columns);
    let first_row = tile / columns % rows * TILE;
    let first_column = tile % columns * TILE;
    let row = thread / 16u * 4u;
    let column = thread % 16u * 4u;

    var sums: array<vec4<f32>, 4>;
    for (var start = 0u; start < s.k; start += DEPTH) {
        for (var part = 0u; part < 4u; part += 1u) {
            let at = part * 256u + thread;
            let a_at = {{ a_place }};
            let m = first_row + a_at.x;
            let a_k = start + a_at.y;
            var value = 0.0;
            if (z < s.z && m < s.m && a_k < s.k) {
                value = a[z * s.a_z + m * s.a_m + a_k * s.a_k];
            }
            slice_a[a_at.y][a_at.x] = value;

            let b_at = {{ b_place }};
            let n = first_column + b_at.x;
            let b_k = start + b_at.y;
            value = 0.0;
            if (z < s.z && n < s.n && b_k < s.k) {
                value = b[z * s.b_z + b_k * s.b_k + n * s.b_n];
            }
            slice_b[b_at.y][b_at.x] = value;
        }
        workgroupBarrier();
        for (var k = 0u; k < DEPTH; k += 1u) {
            let right = vec4<f32>(
                slice_b[k][column],
                slice_b[k][column + 1u],
                slice_b[k][column + 2u],
                slice_b[k][column + 3u],
            );
            sums[0] = fma(vec4<f32>(slice_a[k][row]), right, sums[0]);
            sums[1] = fma(vec4<f32>(slice_a[k][row + 1u]), right, sums[1]);
            sums[2] = fma(vec4<f32>(slice_a[k][row + 2u]), right, sums[2]);
            sums[3] = fma(vec4<f32>(slice_a[k][row + 3u]), right, sums[3]);
        }
        workgroupBarrier();
    }

    for (var i = 0u; i < 4u; i += 1u) {
        let m = first_row + row + i;
        for (var j = 0u; j < 4u; j += 1u) {
            let n = first_column + column + j;
            if (z < s.z && m < s.m && n < s.n) {
                c[(z * s.m + m) * s.n + n] = sums[i][j];
            }
        }
    }
}
