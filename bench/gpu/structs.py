"""The structs of include/squeeze_attention.h and squeeze_cuda.h for ctypes; check_structs.py holds them against C."""
import ctypes as c

P, U32, F32, BOOL = c.c_void_p, c.c_uint32, c.c_float, c.c_bool
F16, BF16, I8 = 1, 2, 3     # enum sqz_row_type; 0: none
CUDA = 1                    # enum sqz_memory_space


class Shape(c.Structure):
    _fields_ = [("n_head", U32), ("n_head_kv", U32), ("head_dim", U32), ("scale", F32)]


class Centres(c.Structure):
    _fields_ = [("type", c.c_int), ("data", P), ("scale", P), ("mean", P), ("offset", P), ("n", U32)]


class Planes(c.Structure):
    _fields_ = [("lower", P), ("step", P), ("whole", P), ("n_whole", U32), ("centres", Centres)]


class Rows(c.Structure):
    _fields_ = [("type", c.c_int), ("data", P), ("scale", P), ("mean", P), ("planes", Planes)]


class Level(c.Structure):
    _fields_ = [("n_clusters", U32), ("centroids", Rows), ("value_centroids", Rows), ("offset", P), ("variance", P)]


class Codes(c.Structure):
    _fields_ = [("n_words", U32), ("n_directions", U32), ("words", P), ("directions", P), ("book", P), ("first", P),
                ("spread", P)]


class Layer(c.Structure):
    _fields_ = [("space", c.c_int), ("shape", Shape), ("n_rows", U32), ("n_fixed", U32), ("keys", Rows),
                ("values", Rows), ("n_levels", U32), ("level", Level * 8), ("codes", Codes), ("rule", c.c_int),
                ("group", c.c_int), ("plane_index", P),
                # not looked at by the CUDA library
                ("retained_keys", Rows), ("position", P), ("sliding_window", BOOL), ("n_window_tokens", U32),
                ("tail", BOOL), ("value_skip", BOOL), ("n_curve", U32), ("log_threshold", P), ("share", P),
                ("lost_mass", P), ("tail_gain", P), ("variance_gain", P), ("global_share", P), ("queries", P),
                ("n_queries", U32), ("shared", P), ("will_read", P), ("owned", P)]


class Plan(c.Structure):
    _fields_ = [("log_threshold", P), ("variance_gain", P), ("tail_gain", P), ("tail_skip", F32),
                ("per_sequence", c.c_bool), ("retain_rows", P)]


class Attend(c.Structure):
    _fields_ = [("layer", c.POINTER(Layer)), ("plan", Plan), ("dense", c.c_bool), ("together", c.c_bool),
                ("n_sequences", U32), ("n_tokens", U32), ("queries", P), ("out", P), ("lse", P), ("user_keys", P), ("user_values", P),
                ("user_capacity_rows", U32), ("n_user", U32), ("user_rows", P), ("users", P),
                ("windowed", c.c_bool), ("first_row", c.c_int32), ("n_retained", P), ("read", P), ("workspace", P), ("workspace_bytes", c.c_size_t),
                ("ranks", P), ("user_layer", P), ("user_planes", P), ("user_plane_capacity_rows", U32),
                ("n_plane_rows", U32), ("user_first_row", U32)]


class Selection(c.Structure):
    _fields_ = [("groups", P), ("n_groups", P), ("capacity", U32), ("log_total", P)]


class Calibrate(c.Structure):
    _fields_ = [("layer", c.POINTER(Layer)), ("variance_gain", P), ("n_queries", U32), ("queries", P),
                ("n_points", U32), ("first", F32), ("step", F32), ("share", P), ("workspace", P),
                ("workspace_bytes", c.c_size_t)]


class Merge(c.Structure):
    _fields_ = [("n_parts", U32), ("n_rows", U32), ("head_dim", U32), ("parts", P), ("parts_lse", P),
                ("type", c.c_int), ("out", P), ("lse", P)]


class Cluster(c.Structure):
    _fields_ = [("type", c.c_int), ("n_head_kv", U32), ("n_rows", U32), ("head_dim", U32), ("n_clusters", U32),
                ("n_passes", U32), ("seed", c.c_uint64), ("keys", P), ("centroids", P), ("variance", P),
                ("offset", P), ("order", P), ("objective", P), ("workspace", P), ("workspace_bytes", c.c_size_t)]


# What each stands for.
STRUCTS = {"sqz_layer_shape": Shape, "sqz_centres": Centres, "sqz_planes": Planes, "sqz_rows": Rows,
           "sqz_level": Level, "sqz_codes": Codes, "sqz_layer": Layer,
           "sqz_cuda_plan": Plan, "sqz_cuda_attend_args": Attend, "sqz_cuda_selection": Selection,
           "sqz_cuda_calibrate_args": Calibrate, "sqz_cuda_merge_args": Merge, "sqz_cuda_cluster_args": Cluster}
ENUMS = {"SQZ_ROW_NONE": 0, "SQZ_ROW_F16": F16, "SQZ_ROW_BF16": BF16, "SQZ_ROW_I8": I8, "SQZ_SPACE_CUDA": CUDA,
         "SQZ_MAX_LEVELS": 8}
